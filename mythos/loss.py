"""The training loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_LOGITS = 1 << 24
"""Largest number of logits in memory at a time: 64 MiB in fp32."""


def cross_entropy(hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor, z_loss: float = 0.0) -> Tensor:
    """Mean over the targets that are not ``IGNORED`` of -log softmax(head h)[target] + z_loss * logsumexp(head h)^2.

    ``hidden_BSD`` is h, ``head_VD`` the output matrix. In fp32; 0 if all targets are ignored. At most ``CHUNK_LOGITS``
    logits are in memory at a time. z-loss: PaLM, arXiv 2204.02311.
    """
    hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
    chunk_tokens = max(1, CHUNK_LOGITS // head_VD.shape[0])
    if len(targets_T) <= chunk_tokens:
        total = _sum(hidden_TD, head_VD, targets_T, z_loss)
    elif z_loss == 0 and hasattr(nn, "LinearCrossEntropyOptions"):  # not in torch 2.11
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_tokens)
        total = F.linear_cross_entropy(
            hidden_TD, head_VD, targets_T, reduction="sum", ignore_index=IGNORED, options=options
        ).float()
    else:
        total = _sum_in_chunks(hidden_TD, head_VD, targets_T, z_loss, chunk_tokens)
    return total / (targets_T != IGNORED).sum().clamp(min=1)


def sequence_losses(hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor) -> Tensor:
    """The ``cross_entropy`` of each sequence by itself, (B,)."""
    pairs = zip(hidden_BSD.split(1), targets_BS.split(1), strict=True)
    return torch.stack([cross_entropy(hidden_1SD, head_VD, targets_1S) for hidden_1SD, targets_1S in pairs])


def _sum(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_loss: float) -> Tensor:
    logits_TV = F.linear(hidden_TD, head_VD).float()
    total = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
    if z_loss:
        total = total + z_loss * (logits_TV.logsumexp(dim=-1).square() * (targets_T != IGNORED)).sum()
    return total


def _sum_in_chunks(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_loss: float, chunk_tokens: int) -> Tensor:
    """torch's linear_cross_entropy has no z-loss. The logits of a chunk are recomputed in the backward pass."""
    total = hidden_TD.new_zeros((), dtype=torch.float32)
    for hidden_tD, targets_t in zip(hidden_TD.split(chunk_tokens), targets_T.split(chunk_tokens), strict=True):
        arguments = (hidden_tD, head_VD, targets_t, z_loss)
        total = total + checkpoint(_sum, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total
