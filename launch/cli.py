"""The command line: `mythos COMMAND ...`. Each command is a file of its own beside this one."""

import argparse
import os
import sys
from collections.abc import Sequence

from launch import checkpoint, config, data, evaluate, export, job, params, status, train
from mythos import __version__
from mythos.errors import DONE, FAILED, UserError

DESCRIPTION = """\
Train recurrent-depth (looped) transformers with sparse mixture-of-experts.

  mythos data tokenizer ...       text -> tokenizer
  mythos data prepare ...         text -> token shards; `mythos data --help` lists import, verify and show
  mythos config MODEL.yaml RUN.yaml key=value ...
  mythos params MODEL.yaml        parameters by part
  mythos train  MODEL.yaml RUN.yaml key=value ...
  mythos status RUN               how a run stands, from its directory
  mythos eval   RUN               validation losses of a checkpoint
  mythos checkpoint list RUN      what a run has saved
  mythos export RUN               weights as safetensors

The same train command runs bare (one process) and under torchrun, mpiexec and srun.
"""
EXIT_CODES = (
    "exit codes: 0 done, 2 bad input, 74 checkpoints cannot be written, 85 preempted (start again to go on), "
    "other: failed"
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; a command's ``run(arguments)`` returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mythos",
        description=DESCRIPTION,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mythos {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for command in (train, status, evaluate, checkpoint, export, config, params, data, job):
        command.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a UserError is printed as it is, without a traceback."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:  # argparse does not collect what follows an option: `train a.yaml --accept-changes seed=1`
        if not hasattr(arguments, "configuration") or any(part.startswith("-") for part in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.configuration += rest
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"mythos: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # such as `mythos data show DIR | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("mythos: interrupted", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
