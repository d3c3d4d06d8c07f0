"""Reads any part of a parameter and of its optimizer state from a checkpoint that any number of ranks has written.

A file holds one-dimensional fp32 shards of flattened parameters. The reader asks for a range of elements, which is
copied from all shards that overlap it. A checkpoint therefore fits any number of ranks, any ZeRO stage and any
expert-parallel size without a conversion.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from mythos.checkpoint.content import BUFFER
from mythos.checkpoint.manifest import REMEDY, Manifest, ShardRecord, optimizer_file, weights_file
from mythos.errors import UserError

OPEN_FILES = 64
"""Files kept open at once: below the usual limit of a process, whatever the number of ranks that wrote."""


class _Overlap(NamedTuple):
    """Elements ``first`` to ``last`` of a flattened parameter are wanted, and are in this shard."""

    first: int
    last: int
    shard: ShardRecord

    @property
    def in_shard(self) -> slice:
        """Their positions in the shard."""
        return slice(self.first - self.shard.start, self.last - self.shard.start)


class CheckpointReader:
    """A complete checkpoint, opened for reading.

    Raises:
        UserError: its manifest cannot be read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.manifest = Manifest.load(checkpoint)
        self._open = lru_cache(OPEN_FILES)(lambda name: safe_open(str(checkpoint / name), "pt"))
        self._state_names = lru_cache(OPEN_FILES)(self._read_state_names)

    def weights(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill ``out`` (stop - start) with elements of a flattened parameter."""
        for overlap in self._overlaps(name, start, stop):
            saved = self._open(weights_file(overlap.shard.file_number)).get_slice(name)
            out[overlap.first - start : overlap.last - start].copy_(saved[overlap.in_shard])

    def optimizer_steps(self, name: str) -> float:
        """Number of updates of a parameter."""
        return max(shard.optimizer_steps for shard in self.manifest.parameters[name].shards)

    def optimizer_state(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """The same elements of the optimizer's state tensors, by their names; empty before the first update."""
        state: dict[str, Tensor] = {}
        updated = [overlap for overlap in self._overlaps(name, start, stop) if overlap.shard.optimizer_steps]
        for overlap in updated:
            number = overlap.shard.file_number
            state_names = self._state_names(number).get(name, [])
            if state and set(state_names) != set(state):
                raise UserError(f"{self.checkpoint}: its files hold different optimizer states of {name}: {REMEDY}")
            for state_name in state_names:
                saved = self._open(optimizer_file(number)).get_slice(f"{name}.{state_name}")
                before = partial(self.manifest.parameters[name].state_before, state_name)
                begin, of_shard = before(start), before(overlap.shard.start)
                first, last = before(overlap.first), before(overlap.last)
                out = state.setdefault(state_name, torch.zeros(before(stop) - begin))
                out[first - begin : last - begin] = saved[first - of_shard : last - of_shard]
        return state

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers, such as the experts' balance biases."""
        file = self._open(weights_file(0))
        return {name.removeprefix(BUFFER): file.get_tensor(name) for name in file.keys() if name.startswith(BUFFER)}  # noqa: SIM118

    def parameter(self, name: str) -> Tensor:
        """A full parameter in its own shape."""
        shape = torch.Size(self.manifest.parameters[name].shape)
        flat = torch.empty(shape.numel())
        self.weights(name, 0, shape.numel(), flat)
        return flat.view(shape)

    def _read_state_names(self, number: int) -> dict[str, list[str]]:
        """The names of each parameter's state tensors in an optimizer file, where they are called PARAMETER.STATE."""
        names: dict[str, list[str]] = {}
        for key in self._open(optimizer_file(number)).keys():  # noqa: SIM118 - not a dictionary
            parameter, _, state = key.rpartition(".")
            names.setdefault(parameter, []).append(state)
        return names

    def _overlaps(self, name: str, start: int, stop: int) -> Iterator[_Overlap]:
        for shard in self.manifest.parameters[name].shards:
            first, last = max(start, shard.start), min(stop, shard.stop)
            if first < last:
                yield _Overlap(first, last, shard)
