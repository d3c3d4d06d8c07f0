"""Whole matrices for Muon, whose elements are spread over ranks."""

import heapq
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.plan.moments import moments_before

Span = tuple[int, int]
"""(start, stop) in a flat tensor."""
Change = Callable[[Tensor, Tensor | None], Tensor]
"""(matrices (N, R, C), their second moments (N, max(R, C)) or None, which it updates) -> the changed matrices."""


class FlatSlice(NamedTuple):
    """The part of one parameter that is in a rank's flat tensor: its elements from ``start`` to ``stop``."""

    shape: Sequence[int]  # of the complete parameter, (..., R, C)
    stacked: int  # matrices stacked along R: two where gate and up, or key and value, are fused
    start: int
    stop: int
    position: int  # of element ``start`` in the flat tensor

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of one of its matrices."""
        *_, rows, columns = self.shape
        return rows // self.stacked, columns

    @property
    def moments(self) -> int:
        """How many second moments are on this rank together with these elements."""
        return moments_before(self.matrix, self.stop) - moments_before(self.matrix, self.start)


class Matrix(NamedTuple):
    """One matrix that is orthogonalised by itself; this rank has its elements from ``start`` to ``stop``."""

    rows: int
    columns: int
    start: int
    stop: int
    origin: int  # position of element 0 in the flat tensor, as if the complete matrix were there
    moments_origin: int  # position of its first second moment in the flat tensor of these, likewise

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def moments(self) -> int:
        return max(self.rows, self.columns)


class Routes(NamedTuple):
    """Where numbers that belong to the matrices are: on this rank, and with their owners."""

    parts: list[list[Span]]
    """For each owner: this rank's numbers of the owner's matrices, in the flat tensor."""
    places: list[list[Span]]
    """For each rank: its numbers of this rank's own matrices, in those laid end to end."""
    own: int
    """Numbers of this rank's own matrices."""


class Exchange:
    """Changes whole matrices whose elements are spread over the ranks of a process group.

    Every matrix has one owner, chosen so that all ranks have about the same work. Two all-to-alls: the parts are sent
    to the owner, which changes the complete matrix, and sent back. With P elements on N ranks, a rank sends and
    receives about P / N of them each way, in the training type, and needs a few times that much extra memory (ZeRO-3's
    own gathers receive P). Under ZeRO-0, where every rank has all elements, nothing is sent to the owner and the
    results, P elements, are sent to all ranks. The second moments, which are few, make the same way in fp32. The layout
    alone determines which collectives run, and their sizes.

    Args:
        slices: the elements on this rank, with the parameters in the same order on every rank of the group.
        replicated: every rank has all elements.
        dtype: type in which the matrices are sent and changed.
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
        self.slices = slices
        matrices = sorted(matrices_of(slices), key=lambda m: (m.rows, m.columns))
        owners = choose_owners(matrices, self.ranks)
        self.own = [matrix for matrix, owner in zip(matrices, owners, strict=True) if owner == rank]
        spans = _all_spans(matrices, group, device)
        self.elements = _routes(matrices, owners, rank, spans, _elements)
        self.moments = _routes(matrices, owners, rank, spans, _moments)
        self.sources = [rank] if replicated else list(range(self.ranks))
        self.tall = _tall_spans(matrices)

    def apply(self, change: Change, flat: Tensor, moments: Tensor | None) -> Tensor:
        """Every matrix in ``flat`` changed, at its position; zeros elsewhere. ``moments`` are updated. Collective."""
        own = self._to_owners(flat.to(self.dtype), self.elements)
        own_moments = None if moments is None else self._to_owners(moments, self.moments)
        base = moments_base = 0
        for (rows, columns), alike in groupby(self.own, key=lambda m: (m.rows, m.columns)):
            count, longer = len(list(alike)), max(rows, columns)
            end, moments_end = base + rows * columns * count, moments_base + longer * count
            batch_moments = None if own_moments is None else own_moments[moments_base:moments_end].view(count, longer)
            batch = own[base:end].view(count, rows, columns)
            batch.copy_(change(batch, batch_moments))
            base, moments_base = end, moments_end
        if moments is not None and own_moments is not None:
            moments.copy_(self._from_owners(own_moments, self.moments, moments))
        return self._from_owners(own, self.elements, flat)

    def scale_tall(self, flat: Tensor) -> None:
        """Multiply the elements of tall matrices in ``flat`` by sqrt(R / C)."""
        for start, stop, factor in self.tall:
            flat[start:stop] *= factor

    def _to_owners(self, flat: Tensor, routes: Routes) -> Tensor:
        """This rank's own matrices, or their second moments, laid end to end."""
        received = [flat.new_empty(_length(places)) for places in routes.places]
        if len(self.sources) > 1:
            received = self._all_to_all([_cut(flat, parts) for parts in routes.parts], received)
        else:
            received[self.sources[0]] = _cut(flat, routes.parts[self.sources[0]])
        own = flat.new_empty(routes.own)
        for source in self.sources:
            _paste(own, routes.places[source], received[source])
        return own

    def _from_owners(self, own: Tensor, routes: Routes, like: Tensor) -> Tensor:
        """The numbers that the owners have, in a flat tensor like ``like``."""
        expected = [own.new_empty(_length(parts)) for parts in routes.parts]
        returned = self._all_to_all([_cut(own, places) for places in routes.places], expected)
        flat = torch.zeros_like(like)
        for parts, values in zip(routes.parts, returned, strict=True):
            _paste(flat, parts, values)
        return flat

    def _all_to_all(self, sent: list[Tensor], like: list[Tensor]) -> list[Tensor]:
        """The tensors that the other ranks sent, which have the sizes of ``like``."""
        if self.ranks == 1:
            return sent
        sizes = [tensor.numel() for tensor in like]
        received = sent[0].new_empty(sum(sizes))
        dist.all_to_all_single(received, torch.cat(sent), sizes, [t.numel() for t in sent], group=self.group)
        return list(received.split(sizes))


def matrices_of(slices: Sequence[FlatSlice]) -> list[Matrix]:
    """The matrices of the parameters."""
    matrices, moments_position = [], 0
    for part in slices:
        rows, columns = part.matrix
        size, count = rows * columns, torch.Size(part.shape).numel() // (rows * columns)
        moments_start = moments_position - moments_before(part.matrix, part.start)
        matrices += [
            Matrix(
                rows,
                columns,
                min(max(part.start - number * size, 0), size),
                min(max(part.stop - number * size, 0), size),
                part.position - part.start + number * size,
                moments_start + number * max(rows, columns),
            )
            for number in range(count)
        ]
        moments_position += part.moments
    return matrices


def choose_owners(matrices: Sequence[Matrix], ranks: int) -> list[int]:
    """The owner of each matrix: in order of falling cost, each goes to the rank with the least work so far."""
    loads = [(0, rank) for rank in range(ranks)]
    owners = [0] * len(matrices)
    costs = [matrix.size * min(matrix.rows, matrix.columns) for matrix in matrices]
    for index in sorted(range(len(matrices)), key=lambda i: -costs[i]):
        load, owners[index] = loads[0]
        heapq.heapreplace(loads, (load + costs[index], owners[index]))
    return owners


Counted = Callable[[Matrix, Span], tuple[Span, int, int]]
"""(matrix, the span of its elements on a rank) -> (the span of its numbers there, their origin, how many it has)."""


def _elements(matrix: Matrix, span: Span) -> tuple[Span, int, int]:
    return span, matrix.origin, matrix.size


def _moments(matrix: Matrix, span: Span) -> tuple[Span, int, int]:
    shape = (matrix.rows, matrix.columns)
    return (
        (moments_before(shape, span[0]), moments_before(shape, span[1])),
        matrix.moments_origin,
        matrix.moments,
    )


def _routes(
    matrices: Sequence[Matrix], owners: Sequence[int], rank: int, spans: Sequence[Sequence[Span]], counted: Counted
) -> Routes:
    """The routes of the elements, or of the second moments, as ``counted`` says."""
    parts: list[list[Span]] = [[] for _ in spans]
    for matrix, owner in zip(matrices, owners, strict=True):
        (start, stop), origin, _ = counted(matrix, (matrix.start, matrix.stop))
        parts[owner].append((origin + start, origin + stop))
    places: list[list[Span]] = []
    base = 0
    for of_rank in spans:
        base, found = 0, []
        for matrix, owner, span in zip(matrices, owners, of_rank, strict=True):
            if owner == rank:
                (start, stop), _, count = counted(matrix, span)
                found.append((base + start, base + stop))
                base += count
        places.append(found)
    return Routes(parts, places, base)


def _all_spans(matrices: Sequence[Matrix], group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """(start, stop) of each matrix on each rank. Collective."""
    here = torch.tensor([(matrix.start, matrix.stop) for matrix in matrices], device=device)
    spans = [torch.empty_like(here) for _ in range(dist.get_world_size(group))]
    dist.all_gather(spans, here, group=group)
    return torch.stack(spans).tolist()


def _tall_spans(matrices: Sequence[Matrix]) -> list[tuple[int, int, float]]:
    """Where elements of matrices with more rows than columns are, and sqrt(R / C); neighbours are joined."""
    joined: list[tuple[int, int, float]] = []
    for matrix in sorted(matrices, key=lambda m: m.origin + m.start):
        start, stop, factor = matrix.origin + matrix.start, matrix.origin + matrix.stop, shape_factor(matrix[:2])
        if factor == 1 or start == stop:
            continue
        if joined and joined[-1][1:] == (start, factor):
            start = joined.pop()[0]
        joined.append((start, stop, factor))
    return joined


def shape_factor(matrix: Sequence[int]) -> float:
    """sqrt(max(1, R / C)) of a matrix of R rows and C columns."""
    *_, rows, columns = matrix
    return max(1.0, rows / columns) ** 0.5


def _length(spans: Sequence[Span]) -> int:
    return sum(stop - start for start, stop in spans)


def _cut(flat: Tensor, spans: Sequence[Span]) -> Tensor:
    parts = [flat[start:stop] for start, stop in spans if stop > start]
    return torch.cat(parts) if parts else flat.new_empty(0)


def _paste(flat: Tensor, spans: Sequence[Span], values: Tensor) -> None:
    position = 0
    for start, stop in spans:
        if stop > start:
            flat[start:stop] = values[position : position + stop - start]
            position += stop - start
