"""Documents out of Parquet files, and the one rule that says which split a document belongs to."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import xxhash

from mythos.errors import UserError

# Documents decoded to Python strings at a time: few enough that long documents stay within memory.
_BATCH_DOCUMENTS = 64


def split_of(text: str, validation_percent: float) -> str:
    """ "train" or "validation": decided by the text alone, so equal documents can never lie in both splits.

    It does not depend on the file, the order or the number of documents. A document in validation at one percentage
    stays there at any higher one. Raises UserError unless 0 < validation_percent < 100.
    """
    if not 0 < validation_percent < 100:
        raise UserError(f"validation-percent {validation_percent}: give a number above 0 and below 100")
    fraction = xxhash.xxh3_64_intdigest(text.encode()) / 2**64
    return "validation" if fraction * 100 < validation_percent else "train"


def count_documents(sources: list[Path], column: str) -> int:
    """Rows in all sources, after checking that each is a Parquet file with the text column (UserError if not).

    Called before any long work, so that the last file's wrong name is not found out after hours.
    """
    documents = 0
    for source in sources:
        with _open(source, column) as file:
            documents += file.metadata.num_rows
    return documents


def read_documents(sources: list[Path], column: str) -> Iterator[str]:
    """The texts of a column, file by file and row group by row group; null and empty ones are left out.

    Memory is bounded by about one row group. Raises UserError naming the file for unreadable data.
    """
    for source in sources:
        with _open(source, column) as file:
            for row_group in range(file.num_row_groups):
                try:
                    for batch in file.iter_batches(_BATCH_DOCUMENTS, row_groups=[row_group], columns=[column]):
                        yield from filter(None, batch.column(0).to_pylist())
                except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                    reason = str(error).splitlines()[0]
                    raise UserError(
                        f"{source}: row group {row_group} is damaged ({reason}); fetch the file again"
                    ) from error


def _open(source: Path, column: str) -> parquet.ParquetFile:
    try:
        file = parquet.ParquetFile(source, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise UserError(f"{source}: no such file; check the path") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: not a readable Parquet file ({reason}); give Parquet files") from error
    schema = file.schema_arrow
    if column not in schema.names:
        file.close()
        raise UserError(f"{source}: no column {column!r}; it has {', '.join(schema.names)}: name one by --column")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        file.close()
        raise UserError(f"{source}: column {column!r} holds {kind}, not text; name a text column by --column")
    return file
