"""Which documents share a row. Every row is full: training needs no padding, and no token is lost.

straight: documents are placed end to end and cut wherever a row is full.

best_fit: rows are filled from a bounded buffer of documents so that few documents are cut. A row begins with the rest
of the document that was cut at the end of an earlier row, or else with a document that is longer than a row. The
remaining space is filled by, in this order:
    1. one document, or the pair with the longest first, that exactly fills the row;
    2. else the longest document that fits;
    3. else a document is cut: one that is longer than a row, or the longest. Its rest begins the next row, so a text
       continues either directly after its own beginning or at the start of a row, as with ``straight``.
After "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv 2404.10830), whose rows have padding, and
nanochat, whose rows begin with BOS and which drops what is cut off. Rule 1 makes full rows possible without a cut in
almost every row.
"""

from collections import defaultdict, deque
from typing import NamedTuple, Protocol

import numpy as np

_BUFFER_TOKENS = 1 << 20
_BUFFER_ROWS = 256


class Piece(NamedTuple):
    """A document, or (``continues``) the rest of a document whose beginning is in another row."""

    tokens: np.ndarray
    continues: bool = False


class Packer(Protocol):
    """Takes documents and returns full rows."""

    documents_cut: int
    """Documents that are split over several rows, each counted once."""

    def add(self, piece: Piece) -> list[np.ndarray]:
        """Take a piece; returns the rows that are full now."""

    def finish(self) -> tuple[list[np.ndarray], list[Piece]]:
        """The last full rows, and the remaining pieces: together less than a row."""


def packer(packing: str, row_tokens: int) -> Packer:
    """The packer with this name."""
    return BestFitPacker(row_tokens) if packing == "best_fit" else StraightPacker(row_tokens)


class StraightPacker:
    """Places documents end to end."""

    def __init__(self, row_tokens: int) -> None:
        self.documents_cut = 0
        self._row_tokens = row_tokens
        self._unfinished: list[Piece] = []
        self._unfinished_tokens = 0

    def add(self, piece: Piece) -> list[np.ndarray]:
        """Take a piece; returns the rows that are full now."""
        self._unfinished.append(piece)
        self._unfinished_tokens += len(piece.tokens)
        row_count, rest = divmod(self._unfinished_tokens, self._row_tokens)
        if not row_count:
            return []
        if self._unfinished_tokens > self._row_tokens and not piece.continues:
            self.documents_cut += 1
        tokens = np.concatenate([part.tokens for part in self._unfinished])
        self._unfinished = [Piece(piece.tokens[len(piece.tokens) - rest :], continues=True)] if rest else []
        self._unfinished_tokens = rest
        return list(tokens[: row_count * self._row_tokens].reshape(row_count, self._row_tokens))

    def finish(self) -> tuple[list[np.ndarray], list[Piece]]:
        """No more rows, and the pieces of the incomplete one."""
        return [], self._unfinished


class BestFitPacker:
    """Best fit from a buffer of about a million tokens, or 256 rows if that is more."""

    def __init__(self, row_tokens: int, buffer_tokens: int | None = None) -> None:
        self.documents_cut = 0
        self._row_tokens = row_tokens
        self._buffer_tokens = buffer_tokens or max(_BUFFER_TOKENS, _BUFFER_ROWS * row_tokens)
        self._held_tokens = 0
        self._continuing: deque[Piece] = deque()
        self._long: deque[Piece] = deque()
        self._by_length: dict[int, deque[Piece]] = defaultdict(deque)
        # Whether the buffer has a document of each length, so that the search for a pair is one vector operation.
        self._present = np.zeros(row_tokens + 1, dtype=bool)

    def add(self, piece: Piece) -> list[np.ndarray]:
        """Take a piece; returns the rows that were made to free buffer space for it."""
        self._keep(piece)
        rows = []
        while self._held_tokens >= max(self._buffer_tokens, self._row_tokens):
            rows.append(self._next_row())
        return rows

    def finish(self) -> tuple[list[np.ndarray], list[Piece]]:
        """The rows that can still be filled from the buffer, and the remaining pieces."""
        rows = []
        while self._held_tokens >= self._row_tokens:
            rows.append(self._next_row())
        documents = [piece for length in sorted(self._by_length) for piece in self._by_length[length]]
        return rows, [*self._continuing, *documents]

    def _keep(self, piece: Piece) -> None:
        length = len(piece.tokens)
        self._held_tokens += length
        if piece.continues:
            self._continuing.append(piece)
        elif length > self._row_tokens:
            self._long.append(piece)
        else:
            self._by_length[length].append(piece)
            self._present[length] = True

    def _take(self, length: int) -> Piece:
        held = self._by_length[length]
        piece = held.popleft()
        self._present[length] = bool(held)
        return piece

    def _next_row(self) -> np.ndarray:
        parts: list[np.ndarray] = []
        free = self._row_tokens

        def place(piece: Piece) -> None:
            nonlocal free
            parts.append(piece.tokens[:free])
            self._held_tokens -= len(piece.tokens)
            if len(piece.tokens) > free:
                if not piece.continues:
                    self.documents_cut += 1
                rest = Piece(piece.tokens[free:], continues=True)
                self._continuing.appendleft(rest)
                self._held_tokens += len(rest.tokens)
            free -= len(parts[-1])

        if self._continuing:
            place(self._continuing.popleft())
        elif self._long:
            place(self._long.popleft())
        while free:
            lengths = self._fitting(free)
            for length in lengths:
                place(self._take(length))
            if not lengths:
                place(self._to_cut())
        return np.concatenate(parts)

    def _fitting(self, free: int) -> list[int]:
        """The lengths of the next documents for this much space; none if no document fits."""
        if self._present[free]:
            return [free]
        # The lengths i + 1 for which the buffer has a document of that length and one of length free - i - 1.
        longer = np.flatnonzero(self._present[1:free] & self._present[free - 1 : 0 : -1])
        if longer.size:
            first = int(longer[-1]) + 1
            if first * 2 != free or len(self._by_length[first]) > 1:
                return [first, free - first]
        fitting = np.flatnonzero(self._present[: free + 1])
        return [int(fitting[-1])] if fitting.size else []

    def _to_cut(self) -> Piece:
        if self._long:
            return self._long.popleft()
        lengths = np.flatnonzero(self._present)
        # A rest is placed inside a row only if nothing else is left.
        return self._take(int(lengths[-1])) if lengths.size else self._continuing.popleft()
