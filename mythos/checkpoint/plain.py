"""A checkpoint as the plain PyTorch model in one process, without DeepSpeed, whatever the layout that saved it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mythos.checkpoint import layout
from mythos.checkpoint.reader import CheckpointReader
from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.model import Model, build_structure
from mythos.model.moe import plain_parameters


def checked_reader(checkpoint: Path) -> CheckpointReader:
    """A checkpoint whose files of weights are whole. Raises UserError if one is not."""
    reader = CheckpointReader(checkpoint)
    weights = [name for name in reader.manifest.files if name.startswith("weights_")]
    for problem in layout.damaged_files(checkpoint, reader.manifest, only=weights).values():
        raise UserError(f"{problem}: name another step")
    return reader


def plain_tensors(reader: CheckpointReader) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the plain model's weights and of its buffers, in fp32."""
    for name, parts in plain_parameters(reader.manifest.parameters).items():
        tensors = [reader.parameter(part) for part in parts]
        yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
    yield from reader.buffers().items()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """What is saved of a plain model: parameters, and the buffers that belong to its state."""
    saved = model.state_dict()
    return dict(model.named_parameters()) | {name: value for name, value in model.named_buffers() if name in saved}


def load_plain_model(config: Config, checkpoint: Path) -> Model:
    """The model of a checkpoint in evaluation mode, on the CPU and in fp32.

    Raises:
        UserError: the checkpoint is damaged, or was saved by another model than that of the configuration.
    """
    reader = checked_reader(checkpoint)
    model = build_structure(config)
    wanted = values_of(model)
    with torch.no_grad():
        for name, value in plain_tensors(reader):
            own = wanted.pop(name, None)
            if own is None or own.shape != value.shape:
                raise UserError(f"{checkpoint}: its {name} {list(value.shape)} is not of the configured model")
            own.copy_(value)
    if wanted:
        raise UserError(f"{checkpoint}: has no {', '.join(sorted(wanted)[:3])}: not of the configured model")
    return model.eval()
