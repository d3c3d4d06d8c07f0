"""Rules for documents from every kind of file: the split of each, and which rows form one work item."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import xxhash

from mythos.errors import UserError

# The size of a work item: half a minute of work, so that little is lost when a worker is killed.
RANGE_BYTES = 16 << 20
# Repeated documents are stored once in a dictionary, so a range may hold far more text than its bytes suggest.
RANGE_ROWS = 1 << 16


@dataclass(frozen=True)
class RowRange:
    """Rows ``first_row`` to ``first_row + rows - 1`` of a file, whose column holds about ``bytes`` uncompressed."""

    source: str
    first_row: int
    rows: int
    bytes: int


def split_of(content: str | bytes, validation_percent: float) -> str:
    """ "train" or "validation", decided by the content alone, so equal documents are always in the same split.

    It does not depend on the file, the order or the number of documents. A document that is in validation at some
    percentage stays there at any higher one. Raises UserError unless 0 < validation_percent < 100.
    """
    check_validation_percent(validation_percent)
    content = content.encode() if isinstance(content, str) else content
    fraction = xxhash.xxh3_64_intdigest(content) / 2**64
    return "validation" if fraction * 100 < validation_percent else "train"


def check_validation_percent(percent: float) -> None:
    """Raises UserError unless both splits can get documents."""
    if not 0 < percent < 100:
        raise UserError(f"--validation-percent {percent}: give a number above 0 and below 100")


def cut_into_ranges(source: str, groups: Iterable[tuple[int, int]]) -> list[RowRange]:
    """Ranges of about RANGE_BYTES and at most RANGE_ROWS: several consecutive groups, or a part of one.

    Args:
        groups: rows and bytes of each group of rows, such as a row group of a Parquet file.
    """
    ranges: list[RowRange] = []
    first_row = rows = size = 0
    for group_rows, group_bytes in groups:
        if rows and (size + group_bytes > RANGE_BYTES or rows + group_rows > RANGE_ROWS):
            ranges.append(RowRange(source, first_row, rows, size))
            first_row, rows, size = first_row + rows, 0, 0
        rows, size = rows + group_rows, size + group_bytes
        pieces = min(max(-(-size // RANGE_BYTES), -(-rows // RANGE_ROWS)), rows)
        if pieces > 1:
            ends = [rows * piece // pieces for piece in range(pieces + 1)]
            ranges += [
                RowRange(source, first_row + start, end - start, size // pieces) for start, end in pairwise(ends)
            ]
            first_row, rows, size = first_row + rows, 0, 0
    if rows:
        ranges.append(RowRange(source, first_row, rows, size))
    return ranges
