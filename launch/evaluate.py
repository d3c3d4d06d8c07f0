"""`mythos eval`: what a checkpoint of a run is worth."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from launch.arguments import Run, Step
from launch.table import Column, print_table
from launch.train import run_ranks
from mythos.config.arguments import split_arguments
from mythos.errors import DONE, UserError

if TYPE_CHECKING:
    import torch

    from mythos.config.schema import Config


def run(
    directory: Run,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="options that override the run's")
    ] = None,
    step: Step = None,
    depths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="loop depths, such as 1,2,4,8 (default: eval.depths)")
    ] = None,
    documents: Annotated[
        str, typer.Option(metavar="N|all", help="documents of each data set that are measured alone; 0: none")
    ] = "1000",
    bos: Annotated[
        bool, typer.Option("--bos/--no-bos", help="whether such a document begins with BOS, which is not predicted")
    ] = True,
) -> int:
    """Measure a checkpoint: loss, perplexity and bits per byte at each depth.

    They are those of packed rows, as in training, and of documents, each alone. The results are printed, go to
    TensorBoard and, with their settings, to RUN/evaluations/step_XXXXXXXX_HASH.json; other settings give another file.
    The run's own config.yaml is used. Starts under the same launchers as `mythos train`.

    \b
      mpiexec -n 2 mythos eval runs/demo --depths 1,2,4,8
      srun --ntasks-per-node=8 mythos eval runs/demo --step 1000 --documents all eval.sequences=1024
    """
    from mythos.config.load import load_run
    from mythos.run.directory import RunDirectory
    from mythos.run.paths import found_from_here

    names, options = split_arguments(overrides or [])
    if names:
        raise UserError(f"{names[0]}: not of the form key=value; name a checkpoint by its step: --step N")
    if depths is not None:
        options.append(f"eval.depths=[{depths}]")
    if not documents.isdecimal() and documents != "all":
        raise UserError(f"--documents {documents}: give a number, or all")

    def work(config: "Config", device: "torch.device") -> int:
        import torch.distributed as dist

        from mythos.checkpoint.layout import find
        from mythos.eval.evaluate import open_evaluator  # imports DeepSpeed
        from mythos.eval.measure import Wanted
        from mythos.ranks.group import agree

        found = agree(lambda: find(directory, step))
        with open_evaluator(config, device, Wanted(None if documents == "all" else int(documents), bos)) as evaluator:
            metrics = evaluator.measure(found)
        if dist.get_rank() == 0:
            _print(metrics)
        return DONE

    def configure(world_size: int) -> "Config":
        return found_from_here(load_run(RunDirectory(directory).config, options, world_size), directory)

    return run_ranks(configure, work)


def _print(metrics: "Mapping[str, float]") -> None:
    """A row for each metric and a column for each depth."""
    table: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        if name.startswith("eval/"):
            metric, _, steps = name.removeprefix("eval/").partition("_depth_")
            table.setdefault(metric, {})[steps] = f"{value:.4f}"
    depths = dict.fromkeys(steps for row in table.values() for steps in row)
    columns = [Column("metric"), *(Column(f"depth {steps}" if steps else "value", is_number=True) for steps in depths)]
    print_table(columns, [[metric, *(row.get(steps, "") for steps in depths)] for metric, row in table.items()])
