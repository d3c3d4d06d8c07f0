"""What is in bf16 and what stays in fp32; docs/precision.md has the table.

Weights, residual stream and loop state are in fp32. Inside ``products_in(bf16, ...)`` the inputs of matrix products are
rounded to bf16, as in the published runs, which used torch.autocast. Elsewhere everything has the type of its inputs.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import Function, once_differentiable


def products_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in ``dtype``; recomputation in the backward pass finds the same.

    Autocast's cache of rounded weights is off: it would sum the gradients of all loop steps in bf16.
    """
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=False)


def rounded(x: Tensor) -> Tensor:
    """``x`` in the type of matrix products."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight in fp32; the result is an input of matrix products and is rounded for them once."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return rounded(super().forward(x.float()))


class Linear(nn.Linear):
    """W x without a bias, where W keeps its fp32 gradient; see ``_Product``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """W x in the type of matrix products, where W keeps its fp32 gradient."""
    if not torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight)
    return _Product.apply(rounded(x), weight)


class FP32Linear(nn.Linear):
    """W x + b in fp32 in every training type, with weights in fp32 also in a model of another type."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.type_as(self.weight), self.weight, self.bias)


class _Product(Function):
    """W x in the type of x. The gradients of W are added up in W's type, fp32, over the steps of the loop.

    Autocast would keep a rounded copy of W for the backward pass of every loop step; here W is rounded again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight.to(gradient.dtype) if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)
        return of_x, of_weight
