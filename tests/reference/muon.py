"""Muon in its plainest form: one process, one matrix at a time, in fp64."""

import torch
from torch import Tensor, nn

# The polynomials of Polar Express (arXiv 2505.16932, for singular values from 1/1000 of the norm), rounded
POLYNOMIALS = [
    (8.15655452490, -22.4832929256, 15.8787699152),
    (4.04292993517, -2.80891746591, 0.500017845105),
    (3.89166780229, -2.77248415322, 0.506064817850),
    (3.28565375766, -2.36812949334, 0.464490242330),
    (2.34654132586, -1.70978283827, 0.423235511693),
]


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five odd polynomials of the singular values, written out."""
    x = matrix.double()
    if x.norm() == 0:
        return x
    x = x / x.norm() / 1.02
    for a, b, c in POLYNOMIALS:
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


class PlainMuon:
    """Muon over named parameters; ``halves`` are the names of those that stack two matrices."""

    def __init__(self, parameters: dict[str, nn.Parameter], halves: set[str]) -> None:
        self.matrices = []
        for name, parameter in parameters.items():
            for matrix in parameter.data.unbind() if parameter.ndim == 3 else [parameter.data]:
                self.matrices.extend(matrix.chunk(2) if name in halves else [matrix])
        self.parameters, self.halves = parameters, halves
        self.means = [torch.zeros_like(matrix) for matrix in self.matrices]

    def step(self, learning_rate: float, momentum: float, decay: float) -> None:
        """One update from the parameters' gradients."""
        gradients = []
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            for gradient in parameter.grad.unbind() if parameter.ndim == 3 else [parameter.grad]:
                gradients.extend(gradient.chunk(2) if name in self.halves else [gradient])
        for weight, mean, gradient in zip(self.matrices, self.means, gradients, strict=True):
            mean.mul_(momentum).add_((1 - momentum) * gradient)
            rows, columns = weight.shape
            update = newton_schulz((1 - momentum) * gradient + momentum * mean) * max(1, rows / columns) ** 0.5
            decayed = torch.where(update * weight >= 0, decay * weight, 0)
            weight.sub_((learning_rate * (update + decayed)).type_as(weight))
