"""The training loss."""

import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def cross_entropy(hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor) -> Tensor:
    """Mean of -log softmax(head h)[target] over the targets that are not ``IGNORED``, in fp32; 0 if all are."""
    logits_TV = F.linear(hidden_BSD, head_VD).float().flatten(0, 1)
    total = F.cross_entropy(logits_TV, targets_BS.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets_BS != IGNORED).sum().clamp(min=1)
