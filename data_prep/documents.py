"""Documents out of Parquet files, and the one rule that says which split a document belongs to."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet
import xxhash

from mythos.errors import UserError

# What a worker does at a time: half a minute of work, so that little is lost with a killed one.
RANGE_BYTES = 16 << 20
# Repeated documents are stored once in a dictionary, so a range may hold far more text than its bytes say.
RANGE_ROWS = 1 << 16
# Documents decoded at a time, by number and by their mean size in the row group.
_BATCH_DOCUMENTS = 64
_BATCH_BYTES = 8 << 20
_READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class RowRange:
    """Rows ``first_row`` to ``first_row + rows - 1`` of a file, whose column holds about ``bytes`` uncompressed."""

    source: str
    first_row: int
    rows: int
    bytes: int


def split_of(content: str | bytes, validation_percent: float) -> str:
    """ "train" or "validation": decided by the content alone, so equal documents can never lie in both splits.

    It does not depend on the file, the order or the number of documents. A document in validation at one percentage
    stays there at any higher one. Raises UserError unless 0 < validation_percent < 100.
    """
    check_validation_percent(validation_percent)
    content = content.encode() if isinstance(content, str) else content
    fraction = xxhash.xxh3_64_intdigest(content) / 2**64
    return "validation" if fraction * 100 < validation_percent else "train"


def check_validation_percent(percent: float) -> None:
    """Raises UserError unless it leaves something for both splits."""
    if not 0 < percent < 100:
        raise UserError(f"validation-percent {percent}: give a number above 0 and below 100")


def row_ranges(source: Path, column: str, content: str) -> list[RowRange]:
    """The file cut into ranges of about RANGE_BYTES and at most RANGE_ROWS: row groups together, or pieces of one.

    Only the metadata is read. The ranges depend on the file alone, never on who will read them. Raises UserError when
    this is no Parquet file, holds no rows, or no such column of ``content`` ("text" or "token_ids").
    """
    with _open(source, column, content) as file:
        sizes = _row_group_sizes(file.metadata, column)
    if not any(rows for rows, _ in sizes):
        raise UserError(f"{source}: holds no rows; leave it out, or fetch it again")
    ranges: list[RowRange] = []
    first_row = rows = size = 0
    for group_rows, group_bytes in sizes:
        if rows and (size + group_bytes > RANGE_BYTES or rows + group_rows > RANGE_ROWS):
            ranges.append(RowRange(str(source), first_row, rows, size))
            first_row, rows, size = first_row + rows, 0, 0
        rows, size = rows + group_rows, size + group_bytes
        pieces = min(max(-(-size // RANGE_BYTES), -(-rows // RANGE_ROWS)), rows)
        if pieces > 1:
            ends = [rows * piece // pieces for piece in range(pieces + 1)]
            ranges += [
                RowRange(str(source), first_row + start, end - start, size // pieces) for start, end in pairwise(ends)
            ]
            first_row, rows, size = first_row + rows, 0, 0
    if rows:
        ranges.append(RowRange(str(source), first_row, rows, size))
    return ranges


def read_texts(rows: RowRange, column: str) -> Iterator[str]:
    """The texts of these rows; null and empty ones are left out.

    Memory is bounded by _BATCH_DOCUMENTS and about _BATCH_BYTES of them, or by one document. Raises UserError naming
    file and row group for unreadable data.
    """
    for _, batch in _read_batches(rows, column, "text"):
        yield from filter(None, batch.to_pylist())


def read_token_ids(rows: RowRange, column: str, vocabulary_size: int) -> Iterator[np.ndarray]:
    """The lists of token ids of these rows, as integer arrays; null and empty ones are left out.

    Raises UserError naming file and row for a null or an id that is not in [0, vocabulary_size).
    """
    for first_row, batch in _read_batches(rows, column, "token_ids"):
        lengths = compute.fill_null(compute.list_value_length(batch), 0).to_numpy(zero_copy_only=False)
        ends = np.cumsum(lengths)
        values = batch.flatten()
        is_null = values.is_null().to_numpy(zero_copy_only=False)
        ids = values.drop_null().to_numpy(zero_copy_only=False) if not is_null.any() else np.empty(0, dtype=np.int64)
        bad = np.flatnonzero(is_null if is_null.any() else (ids < 0) | (ids >= vocabulary_size))
        if bad.size:
            row = first_row + int(np.searchsorted(ends, bad[0], side="right"))
            found = "a null among the ids" if is_null.any() else f"token id {ids[bad[0]]}"
            raise UserError(
                f"{rows.source}: row {row}: {found}, but the tokenizer has ids 0 to {vocabulary_size - 1}; "
                "give the --tokenizer that made these ids"
            )
        yield from (document for document in np.split(ids, ends[:-1]) if document.size)


def _row_group_sizes(metadata: parquet.FileMetaData, column: str) -> list[tuple[int, int]]:
    """Rows and uncompressed bytes of the column, for each row group."""
    sizes = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        parts = [group.column(index) for index in range(group.num_columns)]
        # A list column is stored as text.list.element or the like; a plain column's own name may hold dots.
        own = [part for part in parts if f"{part.path_in_schema}.".startswith(f"{column}.")]
        sizes.append((group.num_rows, sum(part.total_uncompressed_size for part in own)))
    return sizes


def _read_batches(rows: RowRange, column: str, content: str) -> Iterator[tuple[int, pa.Array]]:
    """Arrays of documents, each with the number of its first row in the file."""
    with _open(Path(rows.source), column, content) as file:
        end = rows.first_row + rows.rows
        group_end = 0
        sizes = _row_group_sizes(file.metadata, column)
        for row_group in range(file.num_row_groups):
            row, group_end = group_end, group_end + file.metadata.row_group(row_group).num_rows
            if group_end <= rows.first_row or row >= end:
                continue
            group_rows, group_bytes = sizes[row_group]
            batch_rows = min(max(_BATCH_BYTES * group_rows // max(group_bytes, 1), 1), _BATCH_DOCUMENTS)
            try:
                for batch in file.iter_batches(batch_rows, row_groups=[row_group], columns=[column], use_threads=False):
                    skip = max(rows.first_row - row, 0)
                    if skip < batch.num_rows and row < end:
                        documents = batch.column(0).slice(skip, end - row - skip)
                        documents.validate(full=True)  # that text is UTF-8, that lists lie within their values
                        yield row + skip, documents
                    row += batch.num_rows
                    if row >= end:
                        break
            except (pa.ArrowException, OSError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"{rows.source}: row group {row_group} is damaged ({reason}); fetch the file again"
                ) from error


def _open(source: Path, column: str, content: str) -> parquet.ParquetFile:
    try:
        # Without a buffer a whole column chunk, which may be the whole file, would be read at once.
        file = parquet.ParquetFile(
            source, page_checksum_verification=True, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False
        )
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file; check the path") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: not a readable Parquet file ({reason}); give Parquet files") from error
    complaint = _complaint(file.schema_arrow, column, content)
    if complaint:
        file.close()
        raise UserError(f"{source}: {complaint}")
    return file


def _complaint(schema: pa.Schema, column: str, content: str) -> str | None:
    if column not in schema.names:
        return f"no column {column!r}; it has {', '.join(schema.names)}: name one by --column"
    if schema.names.count(column) > 1:
        return f"two columns are named {column!r}; write the file again with names that differ"
    kind = schema.field(column).type
    if content == "text":
        if not _is_text(kind):
            return f"column {column!r} holds {kind}, not text; name a text column by --column"
    else:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (is_list and pa.types.is_integer(kind.value_type)):
            return f"column {column!r} holds {kind}, not lists of integers; name a column of token ids by --column"
    return None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a pandas categorical
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
