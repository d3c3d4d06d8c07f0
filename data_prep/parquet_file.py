"""Documents in a column of a Parquet file (a ``TextFile``)."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as parquet

from data_prep.documents import RowRange, cut_into_ranges
from mythos.errors import UserError
from mythos.files import check_regular

# Documents decoded at a time: a maximum, and a size that is turned into a number by their mean size in the row group.
_BATCH_DOCUMENTS = 64
_BATCH_BYTES = 8 << 20
_READ_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class ParquetFile:
    """Column ``column`` of the file at ``path``; ``content`` is "text" or "token_ids"."""

    path: Path
    column: str
    content: str

    def row_ranges(self) -> list[RowRange]:
        """Row groups together, or parts of one; see ``cut_into_ranges``. Only the metadata is read.

        None for a file without rows or whose column holds nulls alone, by its type or by the file's statistics.

        Raises:
            UserError: this is not a Parquet file, or has no column of that content.
        """
        with self._open() as file:
            sizes = self._row_group_sizes(file.metadata)
            if pa.types.is_null(file.schema_arrow.field(self.column).type) or self._holds_nulls_alone(file.metadata):
                return []
        return cut_into_ranges(str(self.path), sizes)

    def texts(self, rows: RowRange) -> Iterator[str]:
        """The texts of these rows, without null and empty ones.

        Memory is bounded by _BATCH_DOCUMENTS and about _BATCH_BYTES of them, or by one document. Raises UserError
        naming file and row group for unreadable data, and file and row for bytes that are not UTF-8.
        """
        for first_row, batch in self.batches(rows):
            for row, document in enumerate(batch.to_pylist(), first_row):
                if document:
                    yield self._decoded(row, document)

    def token_ids(self, rows: RowRange, vocabulary_size: int) -> Iterator[np.ndarray]:
        """The lists of token ids of these rows as integer arrays, without null and empty ones.

        Raises UserError naming file and row for a null or an id that is not in [0, vocabulary_size).
        """
        for first_row, batch in self.batches(rows):
            lengths = compute.fill_null(compute.list_value_length(batch), 0).to_numpy(zero_copy_only=False)
            ends = np.cumsum(lengths)
            values = batch.flatten()
            is_null = values.is_null().to_numpy(zero_copy_only=False)
            has_null = bool(is_null.any())
            ids = np.empty(0, dtype=np.int64) if has_null else values.to_numpy(zero_copy_only=False)
            bad = np.flatnonzero(is_null if has_null else (ids < 0) | (ids >= vocabulary_size))
            if bad.size:
                row = first_row + int(np.searchsorted(ends, bad[0], side="right"))
                found = "a null among the ids" if has_null else f"token id {ids[bad[0]]}"
                raise UserError(
                    f"{self.path}: row {row}: {found}, but the tokenizer has ids 0 to {vocabulary_size - 1}; "
                    "give the --tokenizer that made these ids"
                )
            yield from (document for document in np.split(ids, ends[:-1]) if document.size)

    def batches(self, rows: RowRange) -> Iterator[tuple[int, pa.Array]]:
        """Arrays of documents, each with the number of its first row in the file."""
        with self._open() as file:
            end = rows.first_row + rows.rows
            group_end = 0
            sizes = self._row_group_sizes(file.metadata)
            for row_group, (group_rows, group_bytes) in enumerate(sizes):
                row, group_end = group_end, group_end + group_rows
                if group_end <= rows.first_row or row >= end:
                    continue
                batch_rows = min(max(_BATCH_BYTES * group_rows // max(group_bytes, 1), 1), _BATCH_DOCUMENTS)
                try:
                    for batch in file.iter_batches(
                        batch_rows, row_groups=[row_group], columns=[self.column], use_threads=False
                    ):
                        skip = max(rows.first_row - row, 0)
                        if skip < batch.num_rows and row < end:
                            documents = _text_as_bytes(batch.column(0).slice(skip, end - row - skip))
                            documents.validate(full=True)  # offsets are within the values
                            yield row + skip, documents
                        row += batch.num_rows
                        if row >= end:
                            break
                except (pa.ArrowException, OSError) as error:
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"{self.path}: row group {row_group} is damaged ({reason}); fetch the file again"
                    ) from error

    def _decoded(self, row: int, document: bytes) -> str:
        try:
            return document.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: row {row}: not valid UTF-8 ({error.reason} at byte {error.start}); "
                "write the file again as UTF-8, or choose another --column"
            ) from error

    def _holds_nulls_alone(self, metadata: parquet.FileMetaData) -> bool:
        statistics = [
            (group.num_rows, group.column(index).statistics)
            for group in map(metadata.row_group, range(metadata.num_row_groups))
            for index in range(group.num_columns)
            if group.column(index).path_in_schema == self.column
        ]
        return bool(statistics) and all(known and known.null_count == rows for rows, known in statistics)

    def _row_group_sizes(self, metadata: parquet.FileMetaData) -> list[tuple[int, int]]:
        """Rows and uncompressed bytes of the column, for each row group."""
        sizes = []
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            parts = [group.column(index) for index in range(group.num_columns)]
            # A list column is stored as text.list.element or similar; the name of a plain column may contain dots.
            own = [part for part in parts if f"{part.path_in_schema}.".startswith(f"{self.column}.")]
            sizes.append((group.num_rows, sum(part.total_uncompressed_size for part in own)))
        return sizes

    def _open(self) -> parquet.ParquetFile:
        try:
            check_regular(self.path)
            # Without a buffer, a whole column chunk, which may be the whole file, would be read at once.
            file = parquet.ParquetFile(
                self.path, page_checksum_verification=True, buffer_size=_READ_BUFFER_BYTES, pre_buffer=False
            )
        except FileNotFoundError as error:
            raise UserError(f"{self.path}: no such file; check the path") from error
        except (pa.ArrowException, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{self.path}: not a readable Parquet file ({reason}); give Parquet files") from error
        problem = _column_problem(file.schema_arrow, self.column, self.content)
        if problem:
            file.close()
            raise UserError(f"{self.path}: {problem}")
        return file


def _column_problem(schema: pa.Schema, column: str, content: str) -> str | None:
    if column not in schema.names:
        return f"no column {column!r}; it has {', '.join(schema.names)}: choose one by --column"
    if schema.names.count(column) > 1:
        return f"two columns are named {column!r}; write the file again with different names"
    kind = schema.field(column).type
    if pa.types.is_null(kind):
        return None
    if content == "text":
        if not _is_text(kind):
            return f"column {column!r} holds {kind}, not text; choose a text column by --column"
    else:
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not (is_list and pa.types.is_integer(kind.value_type)):
            return f"column {column!r} holds {kind}, not lists of integers; choose a column of token ids by --column"
    return None


def _text_as_bytes(documents: pa.Array) -> pa.Array:
    """Text as the bytes of each document, which are decoded one by one: so the row of invalid ones is known."""
    if not _is_text(documents.type):
        return documents
    if pa.types.is_dictionary(documents.type):
        documents = documents.dictionary_decode()
    return documents.cast(pa.large_binary())


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a pandas categorical
        kind = kind.value_type
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    # Some writers store text without marking it as UTF-8.
    return is_string or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
