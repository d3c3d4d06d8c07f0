"""The work items that make the parts of a data set. The result of an item depends on the item alone, not on the worker.

A part is made from a row range of a source: for each split it has the packed rows, and then the tail, the remaining
pieces, which do not fill a row. The name of a part is a hash of everything that it depends on, and its record,
NAME.json, is written last: a part that has a record is complete and was made with these settings, even after a kill.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import xxhash
from pydantic import TypeAdapter

from data_prep.documents import RowRange, split_of
from data_prep.encoding import encode
from data_prep.packing import Piece, packer
from data_prep.text_files import text_file
from data_prep.tokenizer_file import load_tokenizer
from mythos.data.dataset import text_targets
from mythos.data.format import SPLITS
from mythos.data.text_bytes import text_bytes_of_ids
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import hash_file, open_regular, opened_atomically, write_atomically
from mythos.readers import Count, read_json

Progress = Callable[[int], None]
"""Called with the number of bytes that were processed since the last call."""

# Incremented when a change of the code changes the parts that are made from the same input.
PART_VERSION = 2
FREE_SPACE = "free space or choose another --output, and run the same command again: finished parts are kept"
# Text passed to the tokenizer at a time; its encodings take dozens of times as much memory.
_BATCH_CHARACTERS = 1 << 18
_VISIBLE_WITHIN_S = 60.0


@dataclass(frozen=True)
class SplitPart:
    """One split of a part. ``tail`` gives, for each piece, its length and whether it continues a cut document.

    ``text_tokens`` counts the targets in the rows that are text, ``tokens_dropped`` what was cut off from documents.
    """

    documents: Count
    documents_cut: Count
    text_bytes: Count | None
    text_tokens: Count
    tokens_dropped: Count
    rows: Count
    tail: list[tuple[Count, bool]]


PartRecord = dict[str, SplitPart]
RECORD: TypeAdapter[PartRecord] = TypeAdapter(PartRecord)


@dataclass(frozen=True)
class PartSettings:
    """What all parts of a data set have in common."""

    directory: str
    tokenizer: str
    tokenizer_sha256: str
    bos: str
    special_ids: tuple[int, ...]
    vocabulary_size: int
    content: str
    column: str
    validation_percent: float
    packing: str
    row_tokens: int
    dtype: str

    def part_name(self, rows: RowRange, source_hash: str) -> str:
        """A hash of everything that the content of the part depends on; the paths of files do not matter."""
        meaning = {name: value for name, value in asdict(self).items() if name not in ("directory", "tokenizer")}
        key = json.dumps([PART_VERSION, meaning, source_hash, rows.first_row, rows.rows], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(key.encode())


class Document(NamedTuple):
    """The token ids of a document, beginning with BOS."""

    tokens: np.ndarray
    split: str
    text_bytes: int | None


@dataclass(frozen=True)
class InspectSource:
    """Result: the row ranges of the source. Reads only its metadata."""

    source: str
    column: str
    content: str
    kind: Literal["inspect"] = "inspect"

    def run(self, progress: Progress) -> Any:
        """Raises UserError if the source is unusable."""
        return [asdict(rows) for rows in text_file(Path(self.source), self.column, self.content).row_ranges()]


@dataclass(frozen=True)
class HashSource:
    """Result: the size of the file and the hash of its content."""

    source: str
    kind: Literal["hash"] = "hash"

    def run(self, progress: Progress) -> Any:
        """Raises UserError if it cannot be read."""
        with os_errors_as_user_errors(self.source, "check the file"), open_regular(Path(self.source)) as file:
            digest = hash_file(file, progress)
            return [file.tell(), digest]


@dataclass(frozen=True)
class MakePart:
    """Result: none; the record is in a file beside the part."""

    name: str
    rows: RowRange
    settings: PartSettings
    kind: Literal["part"] = "part"

    def run(self, progress: Progress) -> Any:
        """Raises UserError for unreadable documents and for a full disk."""
        settings = self.settings
        documents = _text_documents if settings.content == "text" else _token_documents
        directory = Path(settings.directory)
        with os_errors_as_user_errors(directory, FREE_SPACE):
            with ExitStack() as files:
                writers = {
                    split: SplitWriter(
                        files.enter_context(opened_atomically(directory / f"{self.name}.{split}")), settings
                    )
                    for split in SPLITS
                }
                for document in documents(self.rows, settings, progress):
                    writers[document.split].add(document)
                record = {split: writer.finish() for split, writer in writers.items()}
            write_atomically(directory / f"{self.name}.json", RECORD.dump_json(record))


class SplitWriter:
    """Packs the documents of one split and writes the full rows at once, and in the end the remaining pieces."""

    def __init__(self, file: BinaryIO, settings: PartSettings) -> None:
        self._file = file
        self._packer = packer(settings.packing, settings.row_tokens)
        self._special_ids = settings.special_ids
        self._documents = self._rows = self._text_tokens = 0
        self._text_bytes: int | None = 0

    def add(self, document: Document) -> None:
        """Take a document."""
        self._documents += 1
        if self._text_bytes is not None:
            self._text_bytes = None if document.text_bytes is None else self._text_bytes + document.text_bytes
        self.pack(Piece(document.tokens))

    def pack(self, piece: Piece) -> None:
        """Take a piece of a document that is counted already."""
        self._write(self._packer.add(piece))

    def finish(self) -> SplitPart:
        """Write what is left; returns what the file holds."""
        rows, tail = self._packer.finish()
        self._write(rows)
        for piece in tail:
            self._file.write(piece.tokens.tobytes())
        lengths = [(len(piece.tokens), piece.continues) for piece in tail]
        return SplitPart(
            documents=self._documents,
            documents_cut=self._packer.documents_cut,
            text_bytes=self._text_bytes,
            text_tokens=self._text_tokens,
            tokens_dropped=self._packer.tokens_dropped,
            rows=self._rows,
            tail=lengths,
        )

    def _write(self, rows: list[np.ndarray]) -> None:
        for row in rows:
            self._file.write(row.tobytes())
            self._text_tokens += text_targets(row, self._special_ids)
        self._rows += len(rows)


def read_record(directory: Path, name: str, row_bytes: int, token_bytes: int) -> PartRecord | None:
    """The record of a part if the part is complete, or None."""
    try:
        record = read_json(directory / f"{name}.json", RECORD, "it is made again")
        for split, part in record.items():
            expected_bytes = part.rows * row_bytes + sum(length for length, _ in part.tail) * token_bytes
            if (directory / f"{name}.{split}").stat().st_size != expected_bytes:
                return None
    except (OSError, UserError):
        return None
    return record


def wait_until_visible(written: Callable[[], bool]) -> None:
    """Wait for what another node has just written: a network file system may cache for a while that it is missing."""
    until = time.monotonic() + _VISIBLE_WITHIN_S
    while not written() and time.monotonic() < until:
        time.sleep(0.5)


def read_rows(path: str, first_row: int, rows: int, row_tokens: int, dtype: str) -> np.ndarray:
    """Rows of the file of a part, of shape (rows, row_tokens)."""
    offset = first_row * row_tokens * np.dtype(dtype).itemsize
    return np.fromfile(path, dtype=dtype, count=rows * row_tokens, offset=offset).reshape(rows, row_tokens)


def read_tail(path: Path, part: SplitPart, settings: PartSettings) -> Iterator[Piece]:
    """The remaining pieces of a part, which do not fill a row."""
    offset = part.rows * settings.row_tokens * np.dtype(settings.dtype).itemsize
    tokens = np.fromfile(path, dtype=settings.dtype, offset=offset)
    ends = np.cumsum([length for length, _ in part.tail], dtype=np.int64)
    for (length, continues), end in zip(part.tail, ends, strict=True):
        yield Piece(tokens[end - length : end], continues)


def _text_documents(rows: RowRange, settings: PartSettings, progress: Progress) -> Iterator[Document]:
    tokenizer = load_tokenizer(Path(settings.tokenizer), settings.bos)
    for batch in _batches(text_file(Path(rows.source), settings.column, settings.content).texts(rows)):
        size = 0
        for text, ids in zip(batch, encode(tokenizer.encoder, batch, tokenizer.cut, settings.dtype), strict=True):
            content = text.encode()
            size += len(content)
            tokens = np.empty(len(ids) + 1, dtype=settings.dtype)
            tokens[0] = tokenizer.bos
            tokens[1:] = ids
            yield Document(tokens, split_of(content, settings.validation_percent), len(content))
        progress(size)


def _token_documents(rows: RowRange, settings: PartSettings, progress: Progress) -> Iterator[Document]:
    tokenizer = load_tokenizer(Path(settings.tokenizer), settings.bos)
    sizes = text_bytes_of_ids(tokenizer.encoder)
    file = text_file(Path(rows.source), settings.column, settings.content)
    for ids in file.token_ids(rows, settings.vocabulary_size):
        begun = ids if ids[0] == tokenizer.bos else np.concatenate([[tokenizer.bos], ids])
        # As <u4, so that the split does not depend on the type of integers in the file.
        split = split_of(begun.astype("<u4").tobytes(), settings.validation_percent)
        text_bytes = None if sizes is None else int(sizes[ids].sum())
        yield Document(begun.astype(settings.dtype), split, text_bytes)
        progress(ids.nbytes)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
