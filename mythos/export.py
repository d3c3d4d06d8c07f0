"""Writes the weights of a checkpoint as a plain model: safetensors, configuration and tokenizer in one directory.

    DIR/model-00001-of-00003.safetensors ...   weights under the names of the plain PyTorch model
    DIR/model.safetensors.index.json           which file holds which weight
    DIR/config.yaml, DIR/tokenizer.json

Needs no GPU and no DeepSpeed. It keeps at most one output file and one parameter in memory.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mythos.checkpoint import layout
from mythos.checkpoint.exported import INDEX_FILE, REMEDY, read_index
from mythos.checkpoint.plain import checked_reader, plain_tensors, values_of
from mythos.checkpoint.reader import CheckpointReader
from mythos.checkpoint.tensors import write_tensors
from mythos.config.load import load_run
from mythos.errors import UserError
from mythos.files import check_regular
from mythos.model import build_structure
from mythos.readers import one_line
from mythos.run.directory import CONFIG_FILE, RunDirectory

FILE_BYTES = 4 << 30


def export(
    run: Path, output: Path, step: int | None = None, dtype: torch.dtype = torch.float32, file_bytes: int = FILE_BYTES
) -> Path:
    """Write the weights of a checkpoint to ``output``; returns the path of the checkpoint.

    Args:
        run: the run directory.
        step: of the checkpoint; None for the newest complete one.
        dtype: of the written weights; balance biases remain in fp32.
        file_bytes: a new file begins after this size.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or ``output`` is in use or cannot be written.
    """
    checkpoint = layout.find(run, step)
    reader = checked_reader(checkpoint)
    copied = (RunDirectory(run).config, RunDirectory(run).tokenizer)
    for path in copied:
        if not path.is_file():
            raise UserError(f"{path}: missing: copy the run's {path.name} there")
    if output.exists():
        raise UserError(f"{output}: exists: name another directory")
    partial = output.with_name(f".{output.name}.partial.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_weights(reader, partial, dtype, file_bytes)
        for path in copied:
            check_regular(path)
            shutil.copyfile(path, partial / path.name)
        os.rename(partial, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output}: cannot be written ({error}): free space or name another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def load_exported(directory: Path) -> nn.Module:
    """Load an exported model, in evaluation mode, on the CPU and in fp32.

    Raises:
        UserError: a file is missing, or holds weights of another model.
    """
    model = build_structure(load_run(directory / CONFIG_FILE))
    wanted = values_of(model)
    try:
        files = read_index(directory)
        if set(files) != set(wanted):
            raise UserError(
                f"{directory}: weights and {CONFIG_FILE} differ: {sorted(set(files) ^ set(wanted))[:3]} ..."
            )
        for file in sorted(set(files.values())):
            check_regular(directory / file)
            with safe_open(str(directory / file), "pt") as tensors, torch.no_grad():
                for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                    wanted[name].copy_(tensors.get_tensor(name))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        reason = one_line(str(error))
        raise UserError(f"{directory}: not an exported model ({reason}): {REMEDY}") from error
    return model.eval()


def _write_weights(reader: CheckpointReader, directory: Path, dtype: torch.dtype, file_bytes: int) -> None:
    numbers: dict[str, int] = {}  # of the file that holds a weight
    count, total_bytes = 0, 0
    for tensors in _in_groups(plain_tensors(reader, dtype), file_bytes):
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
