"""Writes the weights of a checkpoint as a plain model: safetensors, configuration and tokenizer in one directory.

    DIR/model-00001-of-00003.safetensors ...   weights under the names of the plain PyTorch model
    DIR/model.safetensors.index.json           which file holds which weight
    DIR/config.yaml, DIR/tokenizer.json
    DIR/config.json, tokenizer_config.json ... for transformers: see ``mythos.export.hugging_face``

Needs no GPU and no DeepSpeed. It keeps at most one output file and one parameter in memory.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mythos.checkpoint import layout
from mythos.checkpoint.exported import INDEX_FILE, PREFIX_FOR_TRANSFORMERS
from mythos.checkpoint.plain import checked_reader, plain_tensors, values_of
from mythos.checkpoint.tensors import write_tensors
from mythos.config.load import load_run
from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.export.hugging_face import write_description
from mythos.files import check_regular
from mythos.model import build_structure
from mythos.run.directory import CONFIG_FILE, RunDirectory
from mythos.run.paths import bos_of_data

FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class SpecialTokens:
    """The token that begins each document, and the one that ends a text, with which a batch is padded.

    None: BOS of the run's data; and that BOS, which is what follows a document.
    """

    bos: str | None = None
    eos: str | None = None


def export(
    run: Path,
    output: Path,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    file_bytes: int = FILE_BYTES,
    for_transformers: SpecialTokens | None = None,
) -> Path:
    """Write the weights of a checkpoint to ``output``; returns the path of the checkpoint.

    Args:
        run: the run directory.
        step: of the checkpoint; None for the newest complete one.
        dtype: of the written weights; those that the model keeps in fp32 whatever its type remain in fp32.
        file_bytes: a new file begins after this size.
        for_transformers: also write what transformers needs, with these special tokens.

    Raises:
        UserError: there is no such checkpoint, it is damaged or removed meanwhile, or ``output`` is in use or cannot be
            written.
    """
    checkpoint = layout.find(run, step)
    copied = (RunDirectory(run).config, RunDirectory(run).tokenizer)
    for path in copied:
        if not path.is_file():
            raise UserError(f"{path}: missing: copy the run's {path.name} there")
    if output.exists():
        raise UserError(f"{output}: exists: name another directory")
    partial = output.with_name(f".{output.name}.partial.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for path in copied:
            check_regular(path)
            shutil.copyfile(path, partial / path.name)
        config = load_run(partial / CONFIG_FILE)
        if for_transformers is not None:
            bos = for_transformers.bos or bos_of_data(config, run)
            write_description(partial, config, dtype, bos, for_transformers.eos or bos)
        types, weights = types_of_weights(config, dtype), plain_tensors(checked_reader(checkpoint))
        write_weights(
            ((name, value.to(types.get(name, dtype))) for name, value in weights),
            partial,
            PREFIX_FOR_TRANSFORMERS if for_transformers else "",
            file_bytes,
        )
        os.rename(partial, output)
    except (OSError, SafetensorError, UserError) as error:
        if not checkpoint.exists():
            raise UserError(
                f"{checkpoint}: was removed while it was exported (a run keeps its newest checkpoint.keep_last): "
                "export another step"
            ) from error
        if isinstance(error, UserError):
            raise
        raise UserError(f"{output}: cannot be written ({error}): free space or name another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def types_of_weights(config: Config, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The type of each weight in a model of type ``dtype``: routers, halting and the injection's decay stay in fp32."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return {name: value.dtype for name, value in values_of(build_structure(config)).items()}
    finally:
        torch.set_default_dtype(usual)


def write_weights(
    weights: Iterable[tuple[str, Tensor]], directory: Path, prefix: str = "", file_bytes: int = FILE_BYTES
) -> None:
    """Write the files of the weights of a plain model, with a prefix before their names."""
    numbers: dict[str, int] = {}  # of the file that holds a weight
    count, total_bytes = 0, 0
    for tensors in _in_groups(((prefix + name, tensor) for name, tensor in weights), file_bytes):
        count += 1
        write_tensors(directory / f"{count}.safetensors", tensors)
        numbers |= dict.fromkeys(tensors, count)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next file's tensors are read
    names = {number: f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
    for number, name in names.items():
        os.rename(directory / f"{number}.safetensors", directory / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: names[number] for name, number in numbers.items()},
    }
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _in_groups(tensors: Iterable[tuple[str, Tensor]], group_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of one file after another."""
    group: dict[str, Tensor] = {}
    for name, tensor in tensors:
        group[name] = tensor
        if sum(member.nbytes for member in group.values()) >= group_bytes:
            yield group
            group = {}
    if group:
        yield group
