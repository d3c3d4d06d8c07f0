"""A rank's part of a checkpoint, copied from the training engine to the CPU.

Every rank saves the fp32 weights and the optimizer state of the elements that it updates, so that each element is saved
once. Nothing else is needed: learning rates and other hyperparameters follow from the configuration and the step, and
training draws no number from a global random generator.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.checkpoint.content import BUFFER
from mythos.engine.engine import TrainingEngine


class ShardRange(NamedTuple):
    """The elements of a flattened parameter that a rank saves, and the number of their updates."""

    start: int
    stop: int
    optimizer_steps: float
    matrix: tuple[int, int] | None
    """Rows and columns of its matrices if they have second moments."""


class Snapshot(NamedTuple):
    """This rank's part of a checkpoint, on the CPU."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    shards: dict[str, ShardRange]
    """By parameter; those without elements here are left out."""


class HostBuffer:
    """CPU memory that every snapshot uses again; pinned if a GPU copies into it.

    Args:
        keep: copy tensors that are on the CPU as well. Otherwise they are passed on uncopied, which is enough while
            training waits for the save.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._copies: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The content of the tensor; complete after ``finish``."""
        if not self._keep and tensor.device.type == "cpu":
            return tensor
        copy = self._copies.get(name)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._copies[name] = copy
        return copy.copy_(tensor, non_blocking=True)

    def finish(self) -> None:
        """Wait for copies from the GPU."""
        if any(tensor.is_pinned() for tensor in self._copies.values()):
            torch.cuda.current_stream().synchronize()


def snapshot(engine: TrainingEngine, buffer: HostBuffer) -> Snapshot:
    """Copy this rank's part. Not collective; training waits for it."""
    weights, optimizer, shards = {}, {}, {}
    for shard in engine.shards():
        start, stop = shard.share
        if start == stop:
            continue
        weights[shard.name] = buffer.copy(shard.name, shard.weights(start, stop))
        for state, values in shard.optimizer_state(start, stop).items():
            name = f"{shard.name}.{state}"
            optimizer[name] = buffer.copy(name, values)
        shards[shard.name] = ShardRange(start, stop, shard.steps, shard.moments and shard.moments.matrix)
    if dist.get_rank() == 0:
        for name, tensor in engine.buffers().items():
            weights[BUFFER + name] = buffer.copy(BUFFER + name, tensor)
    buffer.finish()
    return Snapshot(weights, optimizer, shards)


def world_shape(engine: TrainingEngine) -> dict[str, int | str]:
    """How weights and optimizer state are distributed; for state.json."""
    return {
        "ranks": dist.get_world_size(),
        "zero_stage": engine.stage,
        "expert_parallel_size": engine.expert_parallel_size,
        "precision": engine.precision,
    }
