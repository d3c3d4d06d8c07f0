"""Which documents share a row. Every row is full: training needs no padding.

straight: documents are placed end to end and cut wherever a row is full. No token is lost.

best_fit: rows are filled from a bounded buffer of documents so that few documents are cut, and no token is lost. A row
begins with the rest of the document that was cut at the end of an earlier row, or else with a document that is longer
than a row. The remaining space is filled by, in this order:
    1. one document, or the pair with the longest first, that exactly fills the row;
    2. else the longest document that fits;
    3. else a document is cut: one that is longer than a row, or the longest. Its rest begins the next row, so a text
       continues either directly after its own beginning or at the start of a row, as with ``straight``.
After "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv 2404.10830), whose rows have padding. Rule
1 makes full rows possible without a cut in almost every row.

crop: every row begins with the beginning of a document, and the rest of a document that is cut is dropped, as in the
published models (arXiv 2604.12946) and nanochat. A row is filled from the same buffer by, in this order:
    1. the longest document that fits;
    2. else the shortest document, which is cut.
A document that is longer than a row counts as one that fills a row: no more of it could be used.
"""

from abc import ABC, abstractmethod
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
    """Documents that are split over several rows or whose rest was dropped, each counted once."""
    tokens_dropped: int
    """Tokens of the rests that were dropped."""

    def add(self, piece: Piece) -> list[np.ndarray]:
        """Take a piece; returns the rows that are full now."""

    def finish(self) -> tuple[list[np.ndarray], list[Piece]]:
        """The last full rows, and the remaining pieces: together less than a row."""


def packer(packing: str, row_tokens: int) -> Packer:
    """The packer with this name."""
    match packing:
        case "best_fit":
            return BestFitPacker(row_tokens)
        case "crop":
            return CropPacker(row_tokens)
        case _:
            return StraightPacker(row_tokens)


class StraightPacker:
    """Places documents end to end."""

    def __init__(self, row_tokens: int) -> None:
        self.documents_cut = self.tokens_dropped = 0
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


class _Buffer:
    """The documents that wait for a row, by how much of a row they take."""

    def __init__(self, row_tokens: int) -> None:
        self._by_length: dict[int, deque[Piece]] = defaultdict(deque)
        # Whether there is a document of each length, so that the search for a pair is one vector operation.
        self._present = np.zeros(row_tokens + 1, dtype=bool)

    def keep(self, piece: Piece, length: int) -> None:
        self._by_length[length].append(piece)
        self._present[length] = True

    def take(self, length: int) -> Piece:
        """Remove the oldest document of this length."""
        held = self._by_length[length]
        piece = held.popleft()
        self._present[length] = bool(held)
        return piece

    def pieces(self) -> list[Piece]:
        """All documents, the shortest first."""
        return [piece for length in sorted(self._by_length) for piece in self._by_length[length]]

    def pair(self, tokens: int) -> list[int]:
        """The lengths of two documents that have this many tokens together, the longest possible first; or none."""
        # The lengths i + 1 for which there is a document of that length and one of length tokens - i - 1.
        longer = np.flatnonzero(self._present[1:tokens] & self._present[tokens - 1 : 0 : -1])
        if longer.size:
            first = int(longer[-1]) + 1
            if first * 2 != tokens or len(self._by_length[first]) > 1:
                return [first, tokens - first]
        return []

    def longest(self, limit: int) -> int | None:
        """The length of the longest document of at most ``limit`` tokens."""
        fitting = np.flatnonzero(self._present[: limit + 1])
        return int(fitting[-1]) if fitting.size else None

    def shortest(self) -> int:
        """The length of the shortest document."""
        return int(self._present.argmax())


class _BufferedPacker(ABC):
    """Fills rows from a buffer of about a million tokens, or 256 rows if that is more."""

    def __init__(self, row_tokens: int, buffer_tokens: int | None = None) -> None:
        self.documents_cut = self.tokens_dropped = 0
        self._row_tokens = row_tokens
        self._buffer_tokens = max(buffer_tokens or max(_BUFFER_TOKENS, _BUFFER_ROWS * row_tokens), row_tokens)
        self._held_tokens = 0
        self._buffer = _Buffer(row_tokens)

    def add(self, piece: Piece) -> list[np.ndarray]:
        """Take a piece; returns the rows that were made to free buffer space for it."""
        self._keep(piece)
        return self._rows_while_holding(self._buffer_tokens)

    def finish(self) -> tuple[list[np.ndarray], list[Piece]]:
        """The rows that can still be filled from the buffer, and the remaining pieces."""
        return self._rows_while_holding(self._row_tokens), self._left()

    def _rows_while_holding(self, tokens: int) -> list[np.ndarray]:
        rows = []
        while self._held_tokens >= tokens:
            rows.append(np.concatenate(self._next_row()))
        return rows

    @abstractmethod
    def _keep(self, piece: Piece) -> None:
        """Add a piece to those that wait."""

    @abstractmethod
    def _next_row(self) -> list[np.ndarray]:
        """The parts of a full row; at least a row of tokens is held."""

    @abstractmethod
    def _left(self) -> list[Piece]:
        """The pieces that still wait."""


class BestFitPacker(_BufferedPacker):
    """Cuts few documents, and continues those that it cuts in later rows."""

    def __init__(self, row_tokens: int, buffer_tokens: int | None = None) -> None:
        super().__init__(row_tokens, buffer_tokens)
        self._continuing: deque[Piece] = deque()
        self._long: deque[Piece] = deque()

    def _left(self) -> list[Piece]:
        return [*self._continuing, *self._buffer.pieces()]

    def _keep(self, piece: Piece) -> None:
        self._held_tokens += len(piece.tokens)
        if piece.continues:
            self._continuing.append(piece)
        elif len(piece.tokens) > self._row_tokens:
            self._long.append(piece)
        else:
            self._buffer.keep(piece, len(piece.tokens))

    def _next_row(self) -> list[np.ndarray]:
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
                place(self._buffer.take(length))
            if not lengths:
                place(self._to_cut())
        return parts

    def _fitting(self, free: int) -> list[int]:
        """The lengths of the next documents for this much space; none if no document fits."""
        longest = self._buffer.longest(free)
        if longest is None or longest == free:
            return [] if longest is None else [free]
        return self._buffer.pair(free) or [longest]

    def _to_cut(self) -> Piece:
        if self._long:
            return self._long.popleft()
        longest = self._buffer.longest(self._row_tokens)
        # A rest is placed inside a row only if nothing else is left.
        return self._continuing.popleft() if longest is None else self._buffer.take(longest)


class CropPacker(_BufferedPacker):
    """Drops the rest of a document that it cuts."""

    def _left(self) -> list[Piece]:
        return self._buffer.pieces()

    def _usable(self, piece: Piece) -> int:
        return min(len(piece.tokens), self._row_tokens)

    def _keep(self, piece: Piece) -> None:
        self._held_tokens += self._usable(piece)
        self._buffer.keep(piece, self._usable(piece))

    def _next_row(self) -> list[np.ndarray]:
        parts: list[np.ndarray] = []
        free = self._row_tokens
        while free:
            longest = self._buffer.longest(free)
            piece = self._buffer.take(self._buffer.shortest() if longest is None else longest)
            self._held_tokens -= self._usable(piece)
            parts.append(piece.tokens[:free])
            free -= len(parts[-1])
            dropped = len(piece.tokens) - len(parts[-1])
            self.tokens_dropped += dropped
            self.documents_cut += dropped > 0
        return parts
