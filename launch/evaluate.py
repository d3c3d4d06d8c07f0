"""`mythos eval`: validation losses of a checkpoint of a run."""

from typing import TYPE_CHECKING, Annotated

import typer

from launch.arguments import Run, Step, split_configuration
from launch.train import run_ranks
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
) -> int:
    """Measure the validation losses of a checkpoint.

    Measures the loss at each depth and writes it, with its settings, to RUN/evaluations/step_XXXXXXXX_HASH.json; other
    settings give another file. The run's own config.yaml is used. Starts under the same launchers as `mythos train`.

    \b
      mpiexec -n 2 mythos eval runs/demo
      srun --ntasks-per-node=8 mythos eval runs/demo --step 1000 eval.depths=[1,4,16] eval.sequences=1024
    """
    from mythos.config.load import load_run
    from mythos.run.directory import RunDirectory
    from mythos.run.paths import found_from_here

    names, options = split_configuration(overrides or [])
    if names:
        raise UserError(f"{names[0]}: not of the form key=value; name a checkpoint by its step: --step N")

    def work(config: "Config", device: "torch.device") -> int:
        from mythos.checkpoint.layout import find
        from mythos.eval.evaluate import evaluate_checkpoint  # imports DeepSpeed
        from mythos.ranks.group import agree

        evaluate_checkpoint(config, device, agree(lambda: find(directory, step)))
        return DONE

    def configure(world_size: int) -> "Config":
        return found_from_here(load_run(RunDirectory(directory).config, options, world_size), directory)

    return run_ranks(configure, work)
