"""`mythos export RUN`: a checkpoint's weights as safetensors, with configuration and tokenizer."""

import argparse
from pathlib import Path
from typing import Any

from mythos.errors import DONE


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint's weights as safetensors",
        description="Write the weights of a checkpoint, experts included, as safetensors under the names of the plain "
        "model, with config.yaml and tokenizer.json. Needs no GPU. `mythos.export.load_exported` loads them.",
    )
    parser.add_argument("directory", type=Path, metavar="RUN", help="the run directory")
    parser.add_argument("--step", type=int, metavar="N", help="of the checkpoint (default: the newest complete one)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="new directory (default: RUN/export/STEP)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s, exact")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Export, and say where to."""
    import torch

    from mythos.export import export, find
    from mythos.run.directory import RunDirectory

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.dtype]
    name = find(arguments.directory, arguments.step).name
    output = arguments.output or RunDirectory(arguments.directory).exports / name
    export(arguments.directory, output, arguments.step, dtype)
    megabytes = sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e6
    print(f"{output}: {name}, {megabytes:,.1f} MB in {arguments.dtype}")
    return DONE
