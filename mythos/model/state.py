"""What goes into a step of the loop, and what a sequence carries from step to step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mythos.model.cache import LayerCache
from mythos.model.halting import HaltingState


@dataclass(frozen=True)
class LoopInputs:
    """What is the same at every loop step; the value embeddings are those of the core's layers.

    ``caches`` are those of the core's layers at one step, when text is generated.
    """

    e_BSD: Tensor
    value_embeddings: Sequence[Tensor | None]
    rotary: tuple[Tensor, Tensor]
    caches: Sequence[LayerCache | None] | None = None

    def first(self, sequences: int) -> "LoopInputs":
        """The inputs of the first sequences."""
        if sequences == len(self.e_BSD):
            return self
        return self.of(slice(sequences), self.rotary)

    def of(self, rows: slice | Tensor, rotary: tuple[Tensor, Tensor]) -> "LoopInputs":
        """The inputs of some sequences, whose angles are given."""
        values = [None if value is None else value[rows] for value in self.value_embeddings]
        return LoopInputs(self.e_BSD[rows], values, rotary)


class ObservedRouting(NamedTuple):
    """Which experts the tokens went to in one core layer, and the router's scores, without gradient."""

    chosen_BSE: Tensor
    scores_BSE: Tensor


@dataclass(frozen=True)
class LoopState:
    """What each sequence carries from loop step to loop step; the first dimension of every tensor is the batch.

    ``loop_step_B`` counts a sequence's own loop steps; ``penalties_BP`` sums the two routing penalties (balance, z),
    in fp32, over the steps with gradient and the core's layers; ``routing`` has an entry for each core layer with
    experts if the last step was observed, of the sequences that took part in it.
    """

    h_BSD: Tensor
    loop_step_B: Tensor
    penalties_BP: Tensor
    halting: HaltingState | None = None
    routing: tuple[ObservedRouting, ...] = ()

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.h_BSD)

    def rows(self, first: int, end: int) -> "LoopState":
        """The state of the sequences from ``first`` to ``end``, as views."""
        return self.of(slice(first, end))

    def of(self, rows: slice | Tensor) -> "LoopState":
        """The state of some sequences."""
        return LoopState(
            self.h_BSD[rows],
            self.loop_step_B[rows],
            self.penalties_BP[rows],
            None if self.halting is None else HaltingState(*(tensor[rows] for tensor in self.halting)),
        )

    def output(self) -> Tensor:
        """The final state, or its halting-weighted mean, (B, S, D)."""
        return self.h_BSD if self.halting is None else self.halting.weighted_mean(self.h_BSD)

    def followed_by(self, others: "LoopState") -> "LoopState":
        """The state of these sequences and of others behind them.

        One without sequences is kept if it has a gradient: its exchange with other processes has a backward pass, in
        which all of them must take part.
        """
        if not len(others):
            return self
        if not len(self) and not self.h_BSD.requires_grad:
            return others
        halting = self.halting
        if halting is not None and others.halting is not None:
            halting = HaltingState(*map(_join, halting, others.halting))
        return LoopState(
            _join(self.h_BSD, others.h_BSD),
            _join(self.loop_step_B, others.loop_step_B),
            _join(self.penalties_BP, others.penalties_BP),
            halting,
            self.routing,
        )


def _join(first: Tensor, others: Tensor) -> Tensor:
    return torch.cat((first, others))
