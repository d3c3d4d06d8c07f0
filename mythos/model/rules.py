"""Rules for initial weights: standard normal numbers in a parameter's shape -> its initial values."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mythos.config.init_schema import Init

Rule = Callable[[Tensor], Tensor]
"""It may overwrite the numbers that it is given."""


@dataclass(frozen=True)
class Start:
    """What the initial values of a model depend on besides the seed."""

    options: Init
    width: int
    mean_depth: float = 1.0
    """Mean number of loop steps in training."""

    @property
    def deviation(self) -> float:
        """Root mean square of the entries of a matrix or a table."""
        return initial_deviation(self.width)


def initial_deviation(width: int) -> float:
    """Standard deviation of initial weights and of the loop's first state: sqrt(2 / (5 width)) (arXiv 2604.12946)."""
    return math.sqrt(2 / (5 * width))


def constant(value: float) -> Rule:
    """The same number everywhere."""
    return lambda normal: torch.full_like(normal, value)


def identity(factor: float = 1.0) -> Rule:
    """A multiple of the identity matrix."""
    return lambda normal: factor * torch.eye(len(normal), dtype=normal.dtype, device=normal.device)


def normal(deviation: float) -> Rule:
    """Normal numbers."""
    return lambda normal: deviation * normal


def uniform(bound: float) -> Rule:
    """Uniform numbers between -bound and bound: erf(x / sqrt(2)) of standard normal x is uniform between -1 and 1."""
    return lambda normal: bound * torch.erf(normal / math.sqrt(2))


def orthogonal(deviation: float, stacked: int = 1) -> Rule:
    """Matrices (the last two dimensions) with orthonormal rows or columns, times a factor that makes ``deviation`` the
    root mean square of their entries; ``stacked`` matrices along the rows, each by itself.

    They are replaced one by one in place: the experts of a layer may fill a fifth of a GPU's memory.
    """

    def rule(normal: Tensor) -> Tensor:
        for part in normal.chunk(stacked, dim=-2):
            for matrix in part if part.ndim > 2 else (part,):
                matrix.copy_(deviation * _orthogonal(matrix))
        return normal

    return rule


def _orthogonal(normal: Tensor) -> Tensor:
    rows, columns = normal.shape
    tall = normal if rows >= columns else normal.mT
    q, r = torch.linalg.qr(tall)
    q = q * torch.sign(torch.diagonal(r))  # uniform over orthogonal matrices
    return (q if rows >= columns else q.mT) * math.sqrt(max(rows, columns))
