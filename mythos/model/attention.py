"""Causal self-attention."""

import torch.nn.functional as F
from torch import Tensor, nn

from mythos.config.schema import Attention
from mythos.model.layers import rotate

QK_NORM_EPSILON = 1e-6


class GroupedQueryAttention(nn.Module):
    """softmax(q k^T / sqrt(C) + causal) v, each of K key/value heads serving H/K query heads.

    Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245); multi-head attention when K = H.
    Queries and keys are rotated over the whole head, then RMS-normalised without a learned scale.
    """

    def __init__(self, width: int, config: Attention) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(width, config.heads * config.head_size, bias=False)
        self.key_value = nn.Linear(width, 2 * config.kv_heads * config.head_size, bias=False)
        self.out = nn.Linear(config.heads * config.head_size, width, bias=False)

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, _ = x_BSD.shape
        heads, kv_heads, size = self.config.heads, self.config.kv_heads, self.config.head_size
        q_BHSC = self.query(x_BSD).view(batch, length, heads, size).transpose(1, 2)
        k_BKSC, v_BKSC = self.key_value(x_BSD).view(batch, length, 2, kv_heads, size).permute(2, 0, 3, 1, 4)
        q_BHSC, k_BKSC = rotate(q_BHSC, rotary), rotate(k_BKSC, rotary)
        if self.config.qk_norm:
            q_BHSC = F.rms_norm(q_BHSC, (size,), eps=QK_NORM_EPSILON)
            k_BKSC = F.rms_norm(k_BKSC, (size,), eps=QK_NORM_EPSILON)
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BKSC, v_BKSC, is_causal=True, enable_gqa=heads != kv_heads)
        return self.out(y_BHSC.transpose(1, 2).reshape(batch, length, heads * size))
