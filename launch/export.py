"""`mythos export`: the weights of a checkpoint as safetensors, with configuration and tokenizer."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.arguments import Run, Step
from mythos.errors import DONE


def run(
    directory: Run,
    step: Step = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="new directory (default: RUN/export/STEP)")] = None,
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="of the written weights; fp32 is exact")] = "fp32",
) -> int:
    """Write the weights of a checkpoint as safetensors.

    The weights, experts included, get the names of the plain model; config.yaml and tokenizer.json are written beside
    them. Needs no GPU. `mythos.export.load_exported` loads the result.
    """
    import torch

    from mythos.checkpoint.layout import find
    from mythos.export import export
    from mythos.run.directory import RunDirectory

    name = find(directory, step).name
    output = output or RunDirectory(directory).exports / name
    export(directory, output, step, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    megabytes = sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e6
    print(f"{output}: {name}, {megabytes:,.1f} MB in {dtype}")
    return DONE
