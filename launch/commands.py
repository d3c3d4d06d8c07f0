"""The commands of `mythos`. Each has a file in this package, and is listed here once."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launch import (
    bench,
    checkpoint,
    compare,
    config,
    data_prepare,
    data_show,
    data_synthetic,
    data_tokenizer,
    data_verify,
    evaluate,
    export,
    generate,
    inspect,
    job,
    params,
    parity,
    plan,
    scaling,
    status,
    train,
)
from mythos import __version__
from mythos.errors import UserError

EXIT_CODES = (
    "Exit codes: 0 done, 2 bad input, 74 checkpoints cannot be written, 85 preempted (start again to resume), "
    "other: failed."
)
HELP_WIDTH = 110


def group(summary: str, commands: dict[str, Callable[..., int]]) -> typer.Typer:
    """A group of commands, such as `mythos data`."""
    # Plain help, because rich would draw boxes even when the output is not a terminal.
    app = typer.Typer(
        help=summary,
        epilog=EXIT_CODES,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH},
    )
    for name, run in commands.items():
        app.command(name)(_with_home(run))
    return app


def _with_home(run: Callable[..., int]) -> Callable[..., int]:
    """The command with ``~`` at the start of its paths expanded, as in the paths of a configuration."""

    @functools.wraps(run)
    def command(**arguments: Any) -> int:
        return run(**{name: _expand_home(value) for name, value in arguments.items()})

    return command


def _expand_home(value: Any) -> Any:
    if isinstance(value, list):
        return [_expand_home(part) for part in value]
    if not isinstance(value, Path):
        return value
    try:
        return value.expanduser()
    except RuntimeError:
        raise UserError(f"{value}: there is no such home directory: give the whole path") from None


APP = group(
    "Train recurrent-depth (looped) transformers with sparse mixture-of-experts.",
    {
        "train": train.run,
        "status": status.run,
        "eval": evaluate.run,
        "inspect": inspect.run,
        "compare": compare.run,
        "generate": generate.run,
        "export": export.run,
        "config": config.run,
        "params": params.run,
        "bench": bench.run,
        "plan": plan.run,
        "job": job.run,
    },
)
APP.add_typer(
    group("List or verify the checkpoints of a run.", {"list": checkpoint.run_list, "verify": checkpoint.run_verify}),
    name="checkpoint",
)
APP.add_typer(
    group(
        "Carry out an experiment of several arms and seeds, from its file to its report.",
        {
            "run": parity.run,
            "status": parity.run_status,
            "report": parity.run_report,
            "plan": parity.run_plan,
            "jobs": parity.run_jobs,
        },
    ),
    name="parity",
)
APP.add_typer(
    group("Laws of the loss over parameters, tokens and loop steps.", {"fit": scaling.run}),
    name="scaling",
)
APP.add_typer(
    group(
        "Prepare text for training: Parquet -> tokens -> MDS shards.",
        {
            "tokenizer": data_tokenizer.run,
            "prepare": data_prepare.run_prepare,
            "import": data_prepare.run_import,
            "synthetic": data_synthetic.run,
            "verify": data_verify.run,
            "show": data_show.run,
        },
    ),
    name="data",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"mythos {__version__}")
        raise typer.Exit


@APP.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The options before the command."""


def invoke(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        UserError: a mistake in the arguments, or one that the command found.
    """
    try:
        command = typer.main.get_command(APP)
        # Not command.main(), which would handle closed pipes and interrupts in its own way.
        with command.make_context("mythos", list(arguments)) as context:
            exit_code: int = command.invoke(context)
            return exit_code
    except typer.Exit as end:  # --help, --version
        return end.exit_code
    except typer.TyperException as error:
        raise UserError(_usage_error(error)) from error


def _usage_error(error: typer.TyperException) -> str:
    """One line: what is wrong with the arguments, and the help that lists the right ones."""
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message}: see `{context.command_path if context else 'mythos'} --help`"
