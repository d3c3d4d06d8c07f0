"""The training loss."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100
CHUNK_LOGITS = 1 << 24
"""Logits that are in memory at once: 64 MiB in fp32."""


def cross_entropy(hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor, z_loss: float = 0.0) -> Tensor:
    """Mean over the targets that are not ``IGNORED`` of -log softmax(head h)[target] + z_loss * logsumexp(head h)^2.

    In fp32; 0 if all targets are ignored. The logits are made in chunks of tokens, and made again in the backward
    pass, so that never more than ``CHUNK_LOGITS`` of them are in memory. z-loss: PaLM, arXiv 2204.02311.
    """
    hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
    chunk = max(1, CHUNK_LOGITS // head_VD.shape[0])
    total = hidden_TD.new_zeros((), dtype=torch.float32)
    for hidden_tD, targets_t in zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True):
        arguments = (hidden_tD, head_VD, targets_t, z_loss)
        # One chunk needs no second pass: its logits are within the bound anyway.
        total = total + (_sum(*arguments) if len(targets_T) <= chunk else _recomputed_sum(*arguments))
    return total / (targets_T != IGNORED).sum().clamp(min=1)


def _sum(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_loss: float) -> Tensor:
    logits_TV = F.linear(hidden_TD, head_VD).float()
    total = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")
    if z_loss:
        total = total + z_loss * (logits_TV.logsumexp(dim=-1).square() * (targets_T != IGNORED)).sum()
    return total


def _recomputed_sum(hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_loss: float) -> Tensor:
    return checkpoint(_sum, hidden_TD, head_VD, targets_T, z_loss, use_reentrant=False, preserve_rng_state=False)
