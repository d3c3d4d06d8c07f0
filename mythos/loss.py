"""The training loss: cross-entropy, and the penalties that are added to it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_LOGITS = 1 << 24
"""Largest number of logits in memory at a time: 64 MiB in fp32."""


class Mean(NamedTuple):
    """A mean as a weighted sum and its weight, so that those of several micro batches and ranks can be joined.

    A weight of 0 means that this micro batch had nothing to measure.
    """

    total: Tensor | float
    weight: float = 1.0


class Losses(NamedTuple):
    """What a model returns when it is given targets; only ``total`` has a gradient."""

    total: Tensor
    """The sum that training minimises: the cross-entropy and, in training mode, the penalties."""
    cross_entropy: Tensor
    """Mean over the targets."""
    measured: dict[str, Mean]
    """The penalties as they are in the sum, and diagnostics, under the names of their metrics."""
    by_sequence_B: Tensor | None = None
    """In evaluation mode, the cross-entropy of each sequence."""

    def plus(self, penalties: Mapping[str, Tensor], diagnostics: Mapping[str, Mean] | None = None) -> "Losses":
        """These losses with penalties added to the sum, and with further diagnostics."""
        measured = {name: Mean(penalty.detach()) for name, penalty in penalties.items()}
        total = self.total + sum(penalties.values())
        return self._replace(total=total, measured=self.measured | measured | dict(diagnostics or {}))


def cross_entropy_and_z_loss(
    hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Means over the targets that are not ``IGNORED`` of

        -log softmax(head h)[target]   and   z_loss * logsumexp(head h)^2  (PaLM, arXiv 2204.02311).

    ``hidden_BSD`` is h, ``head_VD`` the output matrix. In fp32; 0 if all targets are ignored. At most ``CHUNK_LOGITS``
    logits are in memory at a time.
    """
    hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
    chunk_tokens = max(1, CHUNK_LOGITS // head_VD.shape[0])
    if len(targets_T) <= chunk_tokens:
        sums = _sums(hidden_TD, head_VD, targets_T, z_loss)
    elif z_loss == 0 and hasattr(nn, "LinearCrossEntropyOptions"):  # not in torch 2.11
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_tokens)
        total = F.linear_cross_entropy(
            hidden_TD, head_VD, targets_T, reduction="sum", ignore_index=IGNORED, options=options
        ).float()
        sums = torch.stack((total, torch.zeros_like(total)))
    else:
        sums = _sums_in_chunks(hidden_TD, head_VD, targets_T, z_loss, chunk_tokens)
    cross_entropy, z = (sums / (targets_T != IGNORED).sum().clamp(min=1)).unbind()
    return cross_entropy, z


def sequence_losses(hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor) -> Tensor:
    """The cross-entropy of each sequence by itself, (B,)."""
    pairs = zip(hidden_BSD.split(1), targets_BS.split(1), strict=True)
    return torch.stack(
        [cross_entropy_and_z_loss(hidden_1SD, head_VD, targets_1S)[0] for hidden_1SD, targets_1S in pairs]
    )


def _sums(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_loss: float) -> Tensor:
    """The sums over tokens of both, (2,)."""
    logits_TV = F.linear(hidden_TD, head_VD).float()
    total = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
    if not z_loss:
        return torch.stack((total, torch.zeros_like(total)))
    z = (logits_TV.logsumexp(dim=-1).square() * (targets_T != IGNORED)).sum()
    return torch.stack((total, z_loss * z))


def _sums_in_chunks(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_loss: float, chunk_tokens: int) -> Tensor:
    """torch's linear_cross_entropy has no z-loss. The logits of a chunk are recomputed in the backward pass."""
    sums = hidden_TD.new_zeros(2, dtype=torch.float32)
    for hidden_tD, targets_t in zip(hidden_TD.split(chunk_tokens), targets_T.split(chunk_tokens), strict=True):
        arguments = (hidden_tD, head_VD, targets_t, z_loss)
        sums = sums + checkpoint(_sums, *arguments, use_reentrant=False, preserve_rng_state=False)
    return sums
