"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices, AdamW for the rest.

For a matrix W of R rows and C columns, its clipped gradient G, learning rate l, momentum b and decay d:

    M <- b M + (1 - b) G                         M is kept, in fp32, as AdamW's ``exp_avg``
    O  = s orthogonal((1 - b) G + b M)           Nesterov momentum; orthogonal(U S V^T) = U V^T; s = sqrt(max(1, R / C))
    W <- W - l O - l d W [O W >= 0]              cautious decay (Chen et al. 2025, arXiv 2510.12402)

With ``decay_by_shape`` the decay has the factor s, too. With a ``beta2`` the update is normalised by a second moment v
(NorMuon, Li et al. 2025, arXiv 2510.05491), of which there is one number for each row, or for each column if these are
more: ``second_moment``, in fp32, from 0 and without a correction of that start, which cancels in the last line:

    u  = mean of O^2 over the shorter side
    v <- beta2 v + (1 - beta2) u
    O <- O / sqrt(max(v, 1e-10)), times the number that gives it the Frobenius norm it had

Everything except orthogonal(...) and the second moment is elementwise and is computed on the part of W and M that a
rank has under ZeRO. These two need complete matrices: see ``mythos.engine.exchange``.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from mythos.engine.exchange import Exchange, shape_factor
from mythos.plan.moments import SECOND_MOMENT

# Five steps, each with the coefficients that are optimal after the previous ones (Polar Express, Amsel et al. 2025,
# arXiv 2505.16932), as in the published runs: singular values above 1/1000 of the norm end up in 1 +- 0.15.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
HEADROOM = 1.02
"""Keeps the largest singular value below 1 despite bf16 rounding: above 1 the first step diverges."""


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximately U V^T of each matrix U S V^T of a batch (N, R, C), by Newton-Schulz steps; zeros stay zeros.

    X <- a X + b (X X^T) X + c (X X^T)^2 X, starting from X = matrix / its norm, transposed if X X^T is then smaller.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    norm = x.float().norm(dim=(-2, -1), keepdim=True)
    x = (x.float() / (HEADROOM * norm).clamp(min=torch.finfo(torch.float32).tiny)).type_as(x)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


LEAST_SECOND_MOMENT = 1e-10


def normalise(matrices: Tensor, moments: Tensor, beta2: float) -> Tensor:
    """Divide matrices (N, R, C) by the root of their second moments (N, max(R, C)), which are updated first."""
    shorter = -1 if matrices.shape[-2] >= matrices.shape[-1] else -2
    x = matrices.float()
    moments.lerp_(x.square().mean(dim=shorter), 1 - beta2)
    divided = x / moments.clamp(min=LEAST_SECOND_MOMENT).sqrt().unsqueeze(shorter)
    norms = [each.norm(dim=(-2, -1), keepdim=True) for each in (x, divided)]
    return divided * (norms[0] / norms[1].clamp(min=torch.finfo(torch.float32).tiny))


def direction(beta2: float, matrices: Tensor, moments: Tensor | None) -> Tensor:
    """O of each matrix of a batch (N, R, C)."""
    found = shape_factor(matrices.shape) * orthogonalise(matrices)
    return found if moments is None else normalise(found, moments, beta2)


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with ``muon`` set are updated by Muon instead.

    ``exchanges`` must be set before the first step: for the first tensor of each list of parameters that DeepSpeed puts
    into such a group, the exchange for the matrices in these tensors. DeepSpeed calls ``step`` with averaged and
    clipped gradients, and does not call it when the step is skipped.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        self.exchanges: dict[Tensor, Exchange] = {}
        super().__init__(groups, **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of the groups' parameters. Collective."""
        assert closure is None
        for group in self.param_groups:
            # ZeRO-3 fills one group at a time, the others are empty; a skipped step of ZeRO-0 has no gradients.
            if group["muon"] and any(parameter.grad is not None for parameter in group["params"]):
                self._muon(group)
        super().step()  # ignores parameters without a gradient

    def _muon(self, group: dict[str, Any]) -> None:
        parameters: list[Tensor] = group["params"]
        if not self.exchanges:  # DeepSpeed makes a trial step with zero gradients while it is being initialised
            for parameter in parameters:
                parameter.grad = None
            return
        exchange = self.exchanges[parameters[0]]
        flat = _flat([self._momentum(parameter, group["momentum"]) for parameter in parameters])
        moments = self._second_moments(parameters, exchange) if group["beta2"] else []
        flat_moments = _flat(moments) if moments else None
        updates = exchange.apply(partial(direction, group["beta2"]), flat, flat_moments)
        if flat_moments is not None and len(moments) > 1:
            for moment, values in zip(moments, flat_moments.split([m.numel() for m in moments]), strict=True):
                moment.copy_(values)
        weights = _flat(parameters)
        decay = group["weight_decay"] * weights * (updates * weights >= 0)
        if group["decay_by_shape"]:
            exchange.scale_tall(decay)
        change = (group["lr"] * (updates + decay)).split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, change, strict=True):
            parameter.sub_(part.view_as(parameter))

    def _momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        """(1 - b) G + b M after the update of M. Takes the gradient away, so that AdamW ignores the parameter."""
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)  # AdamW expects it when it loads a state
            state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        average = state["exp_avg"].lerp_(gradient, 1 - momentum)
        parameter.grad = None
        return gradient.lerp(average, momentum)

    def _second_moments(self, parameters: list[Tensor], exchange: Exchange) -> list[Tensor]:
        """The second moments that are on this rank, for each tensor."""
        counts = [part.moments for part in exchange.slices]
        if len(parameters) == 1:  # it holds all slices; otherwise each tensor is one
            counts = [sum(counts)]
        for parameter, count in zip(parameters, counts, strict=True):
            state = self.state[parameter]
            if SECOND_MOMENT not in state:
                state[SECOND_MOMENT] = torch.zeros(count, device=parameter.device)
        return [self.state[parameter][SECOND_MOMENT] for parameter in parameters]


def _flat(tensors: list[Tensor]) -> Tensor:
    """The tensors laid end to end; a single one is not copied."""
    return tensors[0].flatten() if len(tensors) == 1 else torch.cat([tensor.flatten() for tensor in tensors])
