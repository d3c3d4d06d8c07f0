"""The training loss: cross-entropy, and the penalties that are added to it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

IGNORED = -100
CHUNK_LOGITS = {"cuda": 1 << 27, "cpu": 1 << 24}
"""Largest number of logits in memory at a time: 512 MiB in fp32 on a GPU, 4,096 tokens with a vocabulary of 32,768."""


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


class HeadLoss(NamedTuple):
    """Means over the targets that are not ``IGNORED``, in fp32; only ``total`` has a gradient."""

    total: Tensor
    """Cross-entropy + z-loss."""
    cross_entropy: Tensor
    z_loss: Tensor


def cross_entropy_and_z_loss(
    hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor, z_loss: float = 0.0, count: float | None = None
) -> HeadLoss:
    """Means over the targets that are not ``IGNORED`` of

        -log softmax(head h)[target]   and   z_loss * logsumexp(head h)^2  (PaLM, arXiv 2204.02311).

    ``hidden_BSD`` is h, ``head_VD`` the output matrix; 0 if all targets are ignored. The matrix products are in the
    type of h; everything else is in fp32, including the sum of the head's gradient over chunks of tokens. At most
    ``CHUNK_LOGITS`` logits are in memory at a time.

    Args:
        count: what the sums are divided by, in place of the number of targets that are not ignored.
    """
    hidden_TD, targets_T = hidden_BSD.flatten(0, 1), targets_BS.flatten()
    with_gradient = torch.is_grad_enabled() and (hidden_TD.requires_grad or head_VD.requires_grad)
    sums = _Sums.apply(hidden_TD, head_VD, targets_T, z_loss, with_gradient)
    divisor = (targets_T != IGNORED).sum().clamp(min=1) if count is None else count
    return HeadLoss(*(total / divisor for total in sums))


def sequence_losses(hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor) -> Tensor:
    """The cross-entropy of each sequence by itself, (B,)."""
    pairs = zip(hidden_BSD.split(1), targets_BS.split(1), strict=True)
    return torch.stack(
        [cross_entropy_and_z_loss(hidden_1SD, head_VD, targets_1S).cross_entropy for hidden_1SD, targets_1S in pairs]
    )


class _Sums(Function):
    """Sums over tokens: (cross-entropy + z-loss, cross-entropy, z-loss); the first has a gradient.

    With the logits l = head h, L = logsumexp(l), z the weight of the z-loss and y the target as a unit vector:

        loss = L - l . y + z L^2      dl = (1 + 2 z L) softmax(l) - y      dh = head^T dl      dhead = dl h^T

    The gradients are computed in the forward pass, while the logits of a chunk are in memory; so neither the logits nor
    the head, which ZeRO-3 has gathered, are needed in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, targets_T: Tensor, z_loss: float, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        product_VD = head_VD.to(hidden_TD.dtype)
        cross_entropy_T = torch.empty(len(targets_T), device=hidden_TD.device)
        logsumexp_T = torch.empty_like(cross_entropy_T)
        if with_gradient:
            hidden_gradient_TD = torch.empty_like(hidden_TD)
            head_gradient_VD = torch.zeros_like(head_VD, dtype=torch.float32)
        kept_T1 = (targets_T != IGNORED)[:, None]
        safe_targets_T1 = targets_T[:, None].where(kept_T1, 0)
        chunk_tokens = max(1, CHUNK_LOGITS[hidden_TD.device.type] // len(head_VD))
        for start in range(0, len(targets_T), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            hidden_tD, kept_t1, target_t1 = hidden_TD[chunk], kept_T1[chunk], safe_targets_T1[chunk]
            logits_tV = F.linear(hidden_tD, product_VD).float()
            logit_t1 = logits_tV.gather(1, target_t1)
            log_softmax_tV = logits_tV.log_softmax(dim=-1)
            del logits_tV
            cross_entropy_t1 = -log_softmax_tV.gather(1, target_t1)
            logsumexp_t1 = cross_entropy_t1 + logit_t1
            cross_entropy_T[chunk] = (cross_entropy_t1 * kept_t1).squeeze(1)
            logsumexp_T[chunk] = (logsumexp_t1 * kept_t1).squeeze(1)
            if with_gradient:
                gradient_tV = log_softmax_tV.exp_().mul_((1 + 2 * z_loss * logsumexp_t1) * kept_t1)
                gradient_tV.scatter_add_(1, target_t1, -kept_t1.float())
                gradient_tV = gradient_tV.to(hidden_TD.dtype)
                torch.mm(gradient_tV, product_VD, out=hidden_gradient_TD[chunk])
                if hidden_TD.dtype == torch.float32:
                    head_gradient_VD.addmm_(gradient_tV.T, hidden_tD)
                else:
                    head_gradient_VD += gradient_tV.T @ hidden_tD
        if with_gradient:
            ctx.save_for_backward(hidden_gradient_TD, head_gradient_VD)
        cross_entropy, z = cross_entropy_T.sum(), z_loss * logsumexp_T.square().sum()
        ctx.mark_non_differentiable(cross_entropy, z)
        return cross_entropy + z, cross_entropy, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the head's gradient is large. PyTorch raises an error at a second backward pass.
        return *(saved.mul_(gradient) for saved in ctx.saved_tensors), None, None, None
