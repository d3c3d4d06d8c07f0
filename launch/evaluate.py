"""`mythos eval`: what a checkpoint of a run is worth."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.arguments import Run, RunOverrides, Step
from launch.table import Column, print_table
from launch.train import run_ranks
from mythos.config.arguments import split_arguments
from mythos.errors import DONE, UserError

if TYPE_CHECKING:
    import torch

    from mythos.config.schema import Config


def run(
    directory: Run,
    overrides: RunOverrides = None,
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
    tasks: Annotated[
        str | None,
        typer.Option(metavar="TASK,...", help="files of tasks, and tasks of lm-evaluation-harness (extra `eval`)"),
    ] = None,
    task_data: Annotated[Path | None, typer.Option(metavar="DIR", help="of the data of the files of tasks")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="measure each checkpoint once, those to come too, until the run's last step")
    ] = False,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="items of each task (default: all)")] = None,
) -> int:
    """Measure a checkpoint: loss, perplexity and bits per byte at each depth, and tasks.

    They are those of packed rows, as in training, and of documents, each alone. The results are printed, go to
    TensorBoard and, with their settings, to RUN/evaluations/step_XXXXXXXX_HASH.json; other settings give another file.
    The run's own config.yaml is used. Starts under the same launchers as `mythos train`.

    \b
      mpiexec -n 2 mythos eval runs/demo --depths 1,2,4,8
      srun --ntasks-per-node=8 mythos eval runs/demo --step 1000 --documents all eval.sequences=1024
      mythos eval runs/demo --tasks configs/eval/core.yaml,wikitext --task-data eval_bundle/eval_data
    """
    from mythos.config.load import load_run
    from mythos.run.directory import RunDirectory
    from mythos.run.paths import found_from_here

    names, options = split_arguments(overrides or [])
    if names:
        raise UserError(f"{names[0]}: not of the form key=value; name a checkpoint by its step: --step N")
    if depths is not None:
        options.append(f"eval.depths=[{depths}]")
    if watch and step is not None:
        raise UserError("--watch: measures every checkpoint: leave out --step, or --watch")
    wanted = _wanted(documents, bos, tasks, task_data, limit)

    def work(config: "Config", device: "torch.device") -> int:
        return _measure(config, device, directory, step, watch, wanted)

    def configure(world_size: int) -> "Config":
        return found_from_here(load_run(RunDirectory(directory).config, options, world_size), directory)

    return run_ranks(configure, work)


def _wanted(documents: str, bos: bool, tasks: str | None, task_data: Path | None, limit: int | None) -> dict[str, Any]:
    """The arguments of ``Wanted``, which is imported after the launcher is known."""
    if not documents.isdecimal() and documents != "all":
        raise UserError(f"--documents {documents}: give a number, or all")
    if (task_data or limit) and not tasks:
        raise UserError(f"{'--task-data' if task_data else '--limit'}: has no effect without --tasks: leave it out")
    return {
        "documents": None if documents == "all" else int(documents),
        "with_bos": bos,
        "tasks": tuple(tasks.split(",")) if tasks else (),
        "task_data": None if task_data is None else str(task_data),
        "limit": limit,
    }


def _measure(
    config: "Config", device: "torch.device", directory: Path, step: int | None, watch: bool, wanted: dict[str, Any]
) -> int:
    import torch.distributed as dist

    from mythos.checkpoint.layout import find
    from mythos.eval.evaluate import open_evaluator  # imports DeepSpeed
    from mythos.eval.measure import Wanted
    from mythos.ranks.group import agree

    found = None if watch else agree(lambda: find(directory, step))
    with open_evaluator(config, device, Wanted(**wanted)) as evaluator:
        if found is None:
            evaluator.watch(directory)
            return DONE
        metrics = evaluator.measure(found)
    if dist.get_rank() == 0:
        _print(metrics)
    return DONE


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
