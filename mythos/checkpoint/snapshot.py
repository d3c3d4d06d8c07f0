"""What a checkpoint keeps of a training engine.

Every rank writes the fp32 weights and the optimizer state of the elements that it updates, each element once over all
ranks. Nothing else has to be kept: learning rates and other hyperparameters follow from the configuration and the
step, and training draws no number from a global random generator.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.checkpoint.pieces import BUFFER
from mythos.engine.engine import TrainingEngine


class Snapshot(NamedTuple):
    """This rank's part of a checkpoint, on the CPU."""

    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    pieces: dict[str, tuple[int, int, float]]
    """Start, stop and optimizer steps of each parameter that has elements here."""


class HostBuffer:
    """Memory on the CPU that is filled anew by each snapshot: pinned where a GPU copies into it, and never freed.

    Without ``keep`` tensors that lie on the CPU already are passed on as they are: enough while training waits.
    """

    def __init__(self, keep: bool) -> None:
        self._keep = keep
        self._kept: dict[str, Tensor] = {}

    def copy(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor's content now; complete once ``finish`` was called."""
        if not self._keep and tensor.device.type == "cpu":
            return tensor
        kept = self._kept.get(name)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            self._kept[name] = kept
        return kept.copy_(tensor, non_blocking=True)

    def finish(self) -> None:
        """Wait for copies from the GPU."""
        if any(tensor.is_pinned() for tensor in self._kept.values()):
            torch.cuda.current_stream().synchronize()


def snapshot(engine: TrainingEngine, buffer: HostBuffer) -> Snapshot:
    """Copy this rank's part: no collective, and the time that a save keeps training waiting."""
    weights, optimizer, pieces = {}, {}, {}
    for shard in engine.shards():
        start, stop = shard.share
        if start == stop:
            continue
        weights[shard.name] = buffer.copy(shard.name, shard.weights(start, stop))
        for state, values in shard.optimizer_state(start, stop).items():
            name = f"{shard.name}.{state}"
            optimizer[name] = buffer.copy(name, values)
        pieces[shard.name] = (start, stop, shard.steps)
    if dist.get_rank() == 0:
        for name, tensor in engine.buffers().items():
            weights[BUFFER + name] = buffer.copy(BUFFER + name, tensor)
    buffer.finish()
    return Snapshot(weights, optimizer, pieces)


def world_shape(engine: TrainingEngine) -> dict[str, int | str]:
    """How the state is spread, for those who read state.json."""
    return {
        "ranks": dist.get_world_size(),
        "zero_stage": engine.stage,
        "expert_parallel_size": engine.expert_parallel_size,
        "precision": engine.precision,
    }
