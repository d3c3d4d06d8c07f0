"""Rows sorted by expert, a row for each choice of a token, and the products of each expert with its own rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from mythos.model.precision import product, rounded


class Rows(Function):
    """Row i of the result is row ``order[i] // copies`` of x; ``order`` is a permutation, ``place`` its inverse.

    The gradient is gathered by the inverse, instead of adding rows in place: no atomics, so it is deterministic.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order: Tensor, place: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(place)
        ctx.copies = copies
        return x_TD.index_select(0, order if copies == 1 else order // copies)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (place,) = ctx.saved_tensors
        gradient = gradient.index_select(0, place)
        return gradient if ctx.copies == 1 else gradient.unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None, None


def inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation: ``order[inverse(order)]`` is 0, 1, 2 and so on."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def grouped_linear(x_TD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows of x times its matrix, (T, F); the rows of expert e end before ``ends_E[e]``."""
    x_TD = rounded(x_TD)
    if has_grouped_product(x_TD, weight_EFD):
        return _GroupedProduct.apply(x_TD, weight_EFD, ends_E)
    rows = x_TD.tensor_split(ends_E[:-1].cpu().long())
    return torch.cat([product(x_tD, weight_FD) for x_tD, weight_FD in zip(rows, weight_EFD, strict=True)])


def has_grouped_product(x_TD: Tensor, weight_EFD: Tensor) -> bool:
    """torch has it for every type on a CPU, for bf16 on a GPU; rows must be multiples of 16 bytes."""
    aligned = all(size * x_TD.element_size() % 16 == 0 for size in weight_EFD.shape[1:])
    return aligned and (x_TD.device.type == "cpu" or x_TD.dtype == torch.bfloat16)


class _GroupedProduct(Function):
    """The experts' products in the type of x; the gradients of the weights are summed in fp32, as ``product`` does."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_EFD: Tensor, ends_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_EFD, ends_E)
        return F.grouped_mm(x_TD, weight_EFD.to(x_TD.dtype).mT, offs=ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TF: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight_EFD, ends_E = ctx.saved_tensors
        of_x, of_weight = None, None
        gradient_TF = gradient_TF.contiguous()
        if ctx.needs_input_grad[0]:
            of_x = F.grouped_mm(gradient_TF, weight_EFD.to(gradient_TF.dtype), offs=ends_E)
        if ctx.needs_input_grad[1]:
            of_weight = F.grouped_mm(gradient_TF.T, x_TD, offs=ends_E).to(weight_EFD.dtype)
        return of_x, of_weight, None
