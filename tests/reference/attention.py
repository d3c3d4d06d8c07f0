"""Attention for one query at a time, directly from its definition."""

import math

import torch
from torch import Tensor

from mythos.model.attention import GroupedQueryAttention


def rotate_by_complex_numbers(x_SC: Tensor, base: float) -> Tensor:
    """Channel pair (i, i + C/2) as a complex number, times exp(i * position * base^(-2i/C))."""
    length, channels = x_SC.shape
    pairs = torch.complex(x_SC[:, : channels // 2].double(), x_SC[:, channels // 2 :].double())
    for position in range(length):
        for pair in range(channels // 2):
            angle = position * base ** (-2 * pair / channels)
            pairs[position, pair] = pairs[position, pair] * complex(math.cos(angle), math.sin(angle))
    return torch.cat((pairs.real, pairs.imag), dim=1).float()


def slow_attention(module: GroupedQueryAttention, x_BSD: Tensor, value_BSD: Tensor | None) -> Tensor:
    config = module.config
    group = config.heads // config.kv_heads
    outputs = []
    for row, x_SD in enumerate(x_BSD):
        q = module.query(x_SD).split(config.head_size, dim=-1)
        k_and_v = module.key_value(x_SD).split(config.head_size, dim=-1)
        heads = []
        for head in range(config.heads):
            query = unit_rms(rotate_differentiably(q[head], config.rope_base))
            key = unit_rms(rotate_differentiably(k_and_v[head // group], config.rope_base))
            value = k_and_v[config.kv_heads + head // group]
            if value_BSD is not None:
                own = slice(head // group * config.head_size, (head // group + 1) * config.head_size)
                gate = 2 * torch.sigmoid(x_SD[:, :32] @ module.value_gate.weight[head // group])
                value = value + gate[:, None] * value_BSD[row][:, own]
            rows = []
            for position in range(len(x_SD)):
                scores = key[: position + 1] @ query[position] / math.sqrt(config.head_size)
                rows.append(torch.softmax(scores, dim=0) @ value[: position + 1])
            heads.append(torch.stack(rows))
        outputs.append(module.out(torch.cat(heads, dim=-1)))
    return torch.stack(outputs)


def rotate_differentiably(x_SC: Tensor, base: float) -> Tensor:
    """The same rotation as a matrix for each position."""
    length, channels = x_SC.shape
    rows = []
    for position in range(length):
        matrix = torch.zeros(channels, channels)
        for pair in range(channels // 2):
            angle = position * base ** (-2 * pair / channels)
            other = pair + channels // 2
            matrix[pair, pair] = matrix[other, other] = math.cos(angle)
            matrix[pair, other], matrix[other, pair] = -math.sin(angle), math.sin(angle)
        rows.append(matrix @ x_SC[position])
    return torch.stack(rows)


def unit_rms(x_SC: Tensor) -> Tensor:
    return x_SC / (x_SC.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
