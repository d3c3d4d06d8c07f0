"""The kinds of files that documents are read from.

A new kind is a class with the methods of ``TextFile`` in a module of its own, and a case in ``text_file``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.documents import RowRange
from data_prep.parquet_file import ParquetFile


class TextFile(Protocol):
    """A file with one document in each row. Every method raises UserError if the file is unusable or damaged."""

    def row_ranges(self) -> list[RowRange]:
        """The file cut into ranges, found quickly and from the file alone (see ``cut_into_ranges``)."""

    def texts(self, rows: RowRange) -> Iterator[str]:
        """The texts of these rows, without null and empty ones, in bounded memory."""

    def token_ids(self, rows: RowRange, vocabulary_size: int) -> Iterator[np.ndarray]:
        """The token ids of these rows as integer arrays, without null and empty ones; all below the vocabulary size."""


def text_file(path: Path, column: str, content: str) -> TextFile:
    """The reader for a file.

    Args:
        content: what the column holds, "text" or "token_ids".
    """
    return ParquetFile(path, column, content)
