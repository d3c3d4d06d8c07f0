"""Reads parts of parameters, and of their optimizer state, out of the pieces that some number of ranks has written.

Every file holds one-dimensional fp32 pieces of flattened parameters. Whoever reads names the elements that it wants,
and they are collected from as many pieces as they lie in: so a checkpoint fits any number of ranks, any ZeRO stage and
any spread of the experts, and nothing has to be converted first.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mythos.checkpoint import layout

OPEN_FILES = 64
"""Files kept open at once: below the usual limit of a process, whatever the number of ranks that wrote."""
BUFFER = "buffer:"
"""Begins the names of the model's buffers, which lie whole in the first weights file."""


class PieceReader:
    """A complete checkpoint, opened for reading.

    Raises:
        UserError: its manifest cannot be read.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.manifest = layout.Manifest.load(checkpoint)
        self._open = lru_cache(OPEN_FILES)(lambda name: safe_open(str(checkpoint / name), "pt"))
        self._states = lru_cache(OPEN_FILES)(self._read_states)

    def weights(self, name: str, start: int, stop: int, out: Tensor) -> None:
        """Fill ``out`` (stop - start) with elements of a flattened parameter."""
        for number, first, last, here, _ in self._overlaps(name, start, stop):
            part = self._open(layout.weights_file(number)).get_slice(name)
            out[first - start : last - start].copy_(part[first - here : last - here])

    def optimizer_steps(self, name: str) -> float:
        """How many updates a parameter has had."""
        return max(piece[3] for piece in self.manifest.parameters[name].pieces)

    def optimizer_state(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """The parts of the optimizer's state tensors, by their names; empty before the first update."""
        found: dict[str, Tensor] = {}
        for number, first, last, here, steps in self._overlaps(name, start, stop):
            if steps:
                file = self._open(layout.optimizer_file(number))
                for state in self._states(number).get(name, ()):
                    part = file.get_slice(f"{name}.{state}")
                    whole = found.setdefault(state, torch.zeros(stop - start))
                    whole[first - start : last - start] = part[first - here : last - here]
        return found

    def buffers(self) -> dict[str, Tensor]:
        """The model's buffers, such as the experts' balance biases."""
        file = self._open(layout.weights_file(0))
        return {name.removeprefix(BUFFER): file.get_tensor(name) for name in file.keys() if name.startswith(BUFFER)}  # noqa: SIM118

    def whole(self, name: str) -> Tensor:
        """A whole parameter in its own shape."""
        shape = torch.Size(self.manifest.parameters[name].shape)
        flat = torch.empty(shape.numel())
        self.weights(name, 0, shape.numel(), flat)
        return flat.view(shape)

    def _read_states(self, number: int) -> dict[str, list[str]]:
        """The names of the state tensors of each parameter in an optimizer file, where they are PARAMETER.STATE."""
        states: dict[str, list[str]] = {}
        for key in self._open(layout.optimizer_file(number)).keys():  # noqa: SIM118 - not a dictionary
            name, _, state = key.rpartition(".")
            states.setdefault(name, []).append(state)
        return states

    def _overlaps(self, name: str, start: int, stop: int) -> Iterator[tuple[int, int, int, int, float]]:
        """(file, first element wanted from it, last + 1, where its piece starts, its optimizer steps)."""
        for number, begin, end, steps in self.manifest.parameters[name].pieces:
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield number, first, last, begin, steps
