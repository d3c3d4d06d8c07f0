"""`mythos export`: the weights of a checkpoint as safetensors, with configuration and tokenizer."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.arguments import Run, Step
from mythos.errors import DONE, UserError


def run(
    directory: Run,
    step: Step = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="new directory (default: RUN/export/STEP, or STEP_hf)")
    ] = None,
    form: Annotated[
        Literal["safetensors", "hf"],
        typer.Option("--format", help="safetensors: weights, configuration, tokenizer; hf: also for transformers"),
    ] = "safetensors",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="of the written weights; fp32 is exact")] = "fp32",
    bos: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="with hf: what begins each document (default: as in the data)")
    ] = None,
    eos: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="with hf: what ends a text (default: the token that begins it)")
    ] = None,
) -> int:
    """Write the weights of a checkpoint as safetensors.

    The weights, experts included, get the names of the plain model; config.yaml and tokenizer.json are written beside
    them. `mythos.export.load_exported` loads the result. With --format hf, the directory also holds the code of the
    model, with which `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` loads it where this package is
    not installed. Needs no GPU.
    """
    import torch

    from mythos.checkpoint.layout import find
    from mythos.export import SpecialTokens, export
    from mythos.run.directory import RunDirectory

    if form == "safetensors" and (bos or eos):
        raise UserError(f"--{'bos' if bos else 'eos'}: has an effect with --format hf only: leave it out")
    tokens = SpecialTokens(bos, eos) if form == "hf" else None
    name = find(directory, step).name
    output = output or RunDirectory(directory).exports / (name if tokens is None else f"{name}_hf")
    export(directory, output, step, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype], for_transformers=tokens)
    megabytes = sum(path.stat().st_size for path in output.glob("*.safetensors")) / 1e6
    print(f"{output}: {name}, {megabytes:,.1f} MB in {dtype}")
    return DONE
