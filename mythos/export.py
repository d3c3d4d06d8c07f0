"""A checkpoint's weights as a plain model: safetensors, configuration and tokenizer in one directory.

    DIR/model-00001-of-00003.safetensors ...   weights under the names of the plain PyTorch model
    DIR/model.safetensors.index.json           which file holds which weight
    DIR/config.yaml, DIR/tokenizer.json

Neither a GPU nor DeepSpeed is needed. Memory is bounded by one output file and one parameter.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mythos.checkpoint import layout
from mythos.checkpoint.pieces import PieceReader
from mythos.config.load import load
from mythos.data.format import TOKENIZER_FILE
from mythos.errors import UserError
from mythos.model import build_structure
from mythos.model.moe import plain_parameters
from mythos.run.directory import CONFIG_FILE

INDEX_FILE = "model.safetensors.index.json"
FILE_BYTES = 4 << 30


def export(
    run: Path, output: Path, step: int | None = None, dtype: torch.dtype = torch.float32, file_bytes: int = FILE_BYTES
) -> Path:
    """Write the weights of a checkpoint to ``output``; returns the checkpoint.

    Args:
        run: the run directory.
        step: of the checkpoint; the newest complete one where it is None.
        dtype: of the written weights; the balance biases stay in fp32.
        file_bytes: a file is closed once it is as large as this.

    Raises:
        UserError: there is no such checkpoint, it is damaged, or ``output`` is in use or cannot be written.
    """
    checkpoint = layout.find(run, step)
    reader = PieceReader(checkpoint)
    weights = [name for name in reader.manifest.files if name.startswith("weights_")]
    for problem in layout.problems(checkpoint, reader.manifest, only=weights).values():
        raise UserError(f"{problem}: export another step")
    for name in (CONFIG_FILE, TOKENIZER_FILE):
        if not (run / name).is_file():
            raise UserError(f"{run / name}: missing: copy the run's {name} there")
    if output.exists():
        raise UserError(f"{output}: exists: name another directory")
    partial = output.with_name(f".{output.name}.partial.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_weights(reader, partial, dtype, file_bytes)
        for name in (CONFIG_FILE, TOKENIZER_FILE):
            shutil.copyfile(run / name, partial / name)
        os.rename(partial, output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{output}: cannot be written ({error}): free space or name another --output") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return checkpoint


def load_exported(directory: Path) -> nn.Module:
    """The model of an exported directory, in evaluation mode, on the CPU in fp32.

    Raises:
        UserError: a file is missing, or holds another model's weights.
    """
    config = load([directory / CONFIG_FILE], ["parallel.expert_parallel_size=1"])  # one process holds all experts
    model = build_structure(config)
    wanted = dict(model.named_parameters()) | {
        name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()
    }
    try:
        files = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
        if set(files) != set(wanted):
            raise UserError(
                f"{directory}: weights and {CONFIG_FILE} differ: {sorted(set(files) ^ set(wanted))[:3]} ..."
            )
        for file in sorted(set(files.values())):
            with safe_open(str(directory / file), "pt") as tensors, torch.no_grad():
                for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                    wanted[name].copy_(tensors.get_tensor(name))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{directory}: not an exported model ({error}): run `mythos export` again") from error
    return model.eval()


def _write_weights(reader: PieceReader, directory: Path, dtype: torch.dtype, file_bytes: int) -> None:
    gathered: dict[str, Tensor] = {}
    places: dict[str, int] = {}
    number, size, total = 1, 0, 0
    for name, tensor in _tensors(reader, dtype):
        gathered[name], places[name] = tensor, number
        size += tensor.numel() * tensor.element_size()
        total += tensor.numel() * tensor.element_size()
        if size >= file_bytes:
            save_file(gathered, directory / f"{number}.safetensors", {"format": "pt"})
            gathered, number, size = {}, number + 1, 0
    if gathered:
        save_file(gathered, directory / f"{number}.safetensors", {"format": "pt"})
    count = max(places.values())
    final = {n: f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)}
    for n, name in final.items():
        os.rename(directory / f"{n}.safetensors", directory / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: final[n] for name, n in places.items()}}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2))


def _tensors(reader: PieceReader, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, parts in plain_parameters(reader.manifest.parameters).items():
        tensors = [reader.whole(part).to(dtype) for part in parts]
        yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
    yield from reader.buffers().items()
