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
    """Muon over named parameters; ``halves`` are the names of those that stack two matrices.

    With ``beta2``, the update O (R x C) is normalised as in NorMuon (arXiv 2510.05491), in its factored form.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], halves: set[str], beta2: float = 0.0, decay_by_shape: bool = False
    ) -> None:
        self.beta2, self.decay_by_shape = beta2, decay_by_shape
        self.matrices = []
        for name, parameter in parameters.items():
            for matrix in parameter.data.unbind() if parameter.ndim == 3 else [parameter.data]:
                self.matrices.extend(matrix.chunk(2) if name in halves else [matrix])
        self.parameters, self.halves = parameters, halves
        self.means = [torch.zeros_like(matrix) for matrix in self.matrices]
        self.squares = [torch.zeros(max(matrix.shape), dtype=torch.double) for matrix in self.matrices]

    def step(self, learning_rate: float, momentum: float, decay: float) -> None:
        """One update from the parameters' gradients."""
        gradients = []
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            for gradient in parameter.grad.unbind() if parameter.ndim == 3 else [parameter.grad]:
                gradients.extend(gradient.chunk(2) if name in self.halves else [gradient])
        for weight, mean, squares, gradient in zip(self.matrices, self.means, self.squares, gradients, strict=True):
            mean.mul_(momentum).add_((1 - momentum) * gradient)
            rows, columns = weight.shape
            shape = max(1, rows / columns) ** 0.5
            update = newton_schulz((1 - momentum) * gradient + momentum * mean) * shape
            if self.beta2:
                update = divide(update, squares, self.beta2)
            decayed = torch.where(update * weight >= 0, decay * weight, 0)
            if self.decay_by_shape:
                decayed = shape * decayed
            weight.sub_((learning_rate * (update + decayed)).type_as(weight))


def divide(update: Tensor, squares: Tensor, beta2: float) -> Tensor:
    """One row, or one column where these are more, after the other; ``squares`` are their second moments."""
    lines = update if update.shape[0] >= update.shape[1] else update.T
    divided = torch.empty_like(lines)
    for number, line in enumerate(lines):
        squares[number] = beta2 * squares[number] + (1 - beta2) * sum(x**2 for x in line.tolist()) / len(line)
        divided[number] = line / max(float(squares[number]), 1e-10) ** 0.5
    norm_before, norm_after = (sum(x**2 for x in each.flatten().tolist()) ** 0.5 for each in (lines, divided))
    if norm_after:
        divided = divided * norm_before / norm_after
    return divided if update.shape[0] >= update.shape[1] else divided.T
