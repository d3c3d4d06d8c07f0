"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) for matrices, AdamW for the rest.

For a matrix W of R rows and C columns, its clipped gradient G, learning rate l, momentum b and decay d:

    M <- b M + (1 - b) G                                     M is kept, in fp32, as AdamW's ``exp_avg``
    O  = sqrt(max(1, R / C)) orthogonal((1 - b) G + b M)     Nesterov momentum; orthogonal(U S V^T) = U V^T
    W <- W - l O - l d W [O W >= 0]                          cautious decay (Chen et al. 2025, arXiv 2510.12402)

Everything except orthogonal(...) is elementwise and is computed on the part of W and M that a rank has under ZeRO.
Only orthogonal(...) needs complete matrices: see ``Exchange``.
"""

import heapq
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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


class FlatSlice(NamedTuple):
    """The part of one parameter that is in a rank's flat tensor: its elements from ``start`` to ``stop``."""

    shape: Sequence[int]  # of the complete parameter, (..., R, C)
    stacked: int  # matrices stacked along R: two where gate and up, or key and value, are fused
    start: int
    stop: int
    position: int  # of element ``start`` in the flat tensor


class Matrix(NamedTuple):
    """One matrix that is orthogonalised by itself; this rank has its elements from ``start`` to ``stop``."""

    rows: int
    columns: int
    start: int
    stop: int
    origin: int  # position of element 0 in the flat tensor, as if the complete matrix were there

    @property
    def size(self) -> int:
        return self.rows * self.columns


class Exchange:
    """Orthogonalises matrices whose elements are spread over the ranks of a process group.

    Every matrix has one owner, chosen so that all ranks have about the same work. Two all-to-alls: the parts are sent
    to the owner, which orthogonalises the complete matrix, and sent back. With P elements on N ranks, a rank sends and
    receives about P / N of them each way, in the training type, and needs a few times that much extra memory (ZeRO-3's
    own gathers receive P). Under ZeRO-0, where every rank has all elements, nothing is sent to the owner and the
    results, P elements, are sent to all ranks. The layout alone determines which collectives run, and their sizes.

    Args:
        slices: the elements on this rank, with the parameters in the same order on every rank of the group.
        replicated: every rank has all elements.
        dtype: type in which the matrices are sent and orthogonalised.
    """

    def __init__(
        self,
        slices: Sequence[FlatSlice],
        group: dist.ProcessGroup,
        replicated: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.group, self.dtype, self.ranks = group, dtype, dist.get_world_size(group)
        rank = dist.get_rank(group)
        matrices = sorted((matrix for part in slices for matrix in _matrices(part)), key=lambda m: (m.rows, m.columns))
        owners = _owners(matrices, self.ranks)
        self.own = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank]
        spans = _all_spans(matrices, group, device)
        # For each owner, this rank's part of each of the owner's matrices, as (start, stop) in the flat tensor.
        self.parts = [
            [(m.origin + m.start, m.origin + m.stop) for m, o in zip(matrices, owners, strict=True) if o == owner]
            for owner in range(self.ranks)
        ]
        # For each other rank, its part of each of this rank's own matrices, as (start, stop) in those laid end to end.
        self.places = []
        for other in range(self.ranks):
            base, places = 0, []
            for matrix, owner, (start, stop) in zip(matrices, owners, spans[other], strict=True):
                if owner == rank:
                    places.append((base + start, base + stop))
                    base += matrix.size
            self.places.append(places)
        self.sources = [rank] if replicated else list(range(self.ranks))

    def orthogonalise(self, flat: Tensor) -> Tensor:
        """The scaled orthogonal form of every matrix in ``flat``, at its position; zeros elsewhere. Collective."""
        sources = self.sources
        sent = [_cut(flat, parts).to(self.dtype) for parts in self.parts]
        received = [flat.new_empty(_length(places), dtype=self.dtype) for places in self.places]
        if len(sources) > 1:
            received = self._all_to_all(sent, received)
        else:
            received[sources[0]] = sent[sources[0]]
        own = flat.new_empty(sum(matrix.size for matrix in self.own), dtype=self.dtype)
        for source in sources:
            _paste(own, self.places[source], received[source])

        base = 0
        for (rows, columns), alike in groupby(self.own, key=lambda m: (m.rows, m.columns)):
            end = base + rows * columns * len(list(alike))
            batch = own[base:end].view(-1, rows, columns)
            batch.copy_(max(1.0, rows / columns) ** 0.5 * orthogonalise(batch))
            base = end

        returned = self._all_to_all([_cut(own, places) for places in self.places], sent)
        update = torch.zeros_like(flat)
        for parts, values in zip(self.parts, returned, strict=True):
            _paste(update, parts, values)
        return update

    def _all_to_all(self, sent: list[Tensor], like: list[Tensor]) -> list[Tensor]:
        """The tensors that the other ranks sent, which have the sizes of ``like``."""
        if self.ranks == 1:
            return sent
        sizes = [tensor.numel() for tensor in like]
        received = sent[0].new_empty(sum(sizes))
        dist.all_to_all_single(received, torch.cat(sent), sizes, [t.numel() for t in sent], group=self.group)
        return list(received.split(sizes))


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
        rate, momentum = group["lr"], group["momentum"]
        directions = []
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)  # AdamW expects it when it loads a state
                state["exp_avg"] = torch.zeros_like(parameter)
            state["step"] += 1
            average = state["exp_avg"].lerp_(gradient, 1 - momentum)
            directions.append(gradient.lerp(average, momentum).flatten())
            parameter.grad = None
        flat = directions[0] if len(directions) == 1 else torch.cat(directions)
        updates = self.exchanges[parameters[0]].orthogonalise(flat).split([p.numel() for p in parameters])
        for parameter, flat_update in zip(parameters, updates, strict=True):
            update = flat_update.view_as(parameter)
            decay = group["weight_decay"] * parameter * (update * parameter >= 0)
            parameter.sub_(rate * (update + decay))


def _matrices(part: FlatSlice) -> list[Matrix]:
    *_, rows, columns = part.shape
    rows //= part.stacked
    size, count = rows * columns, torch.Size(part.shape).numel() // (rows * columns)
    return [
        Matrix(
            rows,
            columns,
            min(max(part.start - number * size, 0), size),
            min(max(part.stop - number * size, 0), size),
            part.position - part.start + number * size,
        )
        for number in range(count)
    ]


def _owners(matrices: Sequence[Matrix], ranks: int) -> list[int]:
    """The owner of each matrix: in order of falling cost, each goes to the rank with the least work so far."""
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(matrices)
    costs = [matrix.size * min(matrix.rows, matrix.columns) for matrix in matrices]
    for index in sorted(range(len(matrices)), key=lambda i: -costs[i]):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + costs[index], owners[index]))
    return owners


def _all_spans(matrices: Sequence[Matrix], group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """(start, stop) of each matrix on each rank. Collective."""
    here = torch.tensor([(matrix.start, matrix.stop) for matrix in matrices], device=device)
    spans = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
    dist.all_gather(spans, here, group=group)
    return torch.stack(spans).tolist()


def _length(spans: Sequence[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in spans)


def _cut(flat: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    parts = [flat[start:stop] for start, stop in spans if stop > start]
    return torch.cat(parts) if parts else flat.new_empty(0)


def _paste(flat: Tensor, spans: Sequence[tuple[int, int]], values: Tensor) -> None:
    position = 0
    for start, stop in spans:
        if stop > start:
            flat[start:stop] = values[position : position + stop - start]
            position += stop - start
