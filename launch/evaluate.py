"""`mythos eval`: validation losses of a checkpoint of a run."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.config import split_configuration
from launch.train import run_ranks

if TYPE_CHECKING:
    import torch

    from mythos.config.schema import Config

DESCRIPTION = """\
Measure the validation loss of a checkpoint at each depth; the result goes to RUN/evaluations/step_XXXXXXXX.json.
The run's own config.yaml is used. Starts under the same launchers as `mythos train`.

  mpiexec -n 2 mythos eval runs/demo
  srun --ntasks-per-node=8 mythos eval runs/demo step_00001000 eval.depths=[1,4,16] eval.sequences=1024
"""


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "eval",
        help="measure the validation losses of a checkpoint",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument(
        "what",
        nargs="*",
        metavar="step_XXXXXXXX|key=value",
        help="a checkpoint (default: the newest), and options that win over the run's",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Find the checkpoint, join the other ranks, measure."""
    from mythos.config.load import load_run
    from mythos.run.directory import RunDirectory

    names, overrides = split_configuration(arguments.what)

    def work(config: "Config", device: "torch.device") -> int:
        from mythos.errors import DONE
        from mythos.eval.checkpoint_losses import checkpoint_losses, find_checkpoint  # imports DeepSpeed

        checkpoint_losses(config, device, find_checkpoint(arguments.directory, names))
        return DONE

    return run_ranks(lambda world_size: load_run(RunDirectory(arguments.directory).config, overrides, world_size), work)
