"""What the workers do: each item is a piece of work whose result depends on the item alone, not on who does it.

A part is what a row range of a source becomes: for each split the packed rows and then the tail, the pieces that fill
no row. A part's name is a hash of all that it depends on, and its record, NAME.json, is renamed into place last: a part
with a record is whole, and is that of these settings, whatever was killed or changed meanwhile.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import xxhash
from pydantic import TypeAdapter

from data_prep.documents import RowRange, read_texts, read_token_ids, row_ranges, split_of
from data_prep.durable import publish, temporary_path, wait_to_see, writing
from data_prep.packing import Piece, packer
from data_prep.shards import ShardFormat, encode_shard
from data_prep.tokenizer_file import load_tokenizer, text_bytes_of_ids
from mythos.data.format import SPLITS
from mythos.errors import UserError

Progress = Callable[[int], None]
"""Told of the bytes that were worked off since the last call."""

# Bumped when other code would make other parts from the same input.
PART_VERSION = 1
# Text handed to the tokenizer at a time; its encodings take dozens of times as much memory.
_BATCH_CHARACTERS = 1 << 18
_HASH_CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class SplitPart:
    """One split of a part. ``tail`` has, for each piece, its tokens and whether it continues a cut document."""

    documents: int
    documents_cut: int
    text_bytes: int | None
    rows: int
    tail: list[tuple[int, bool]]


PartRecord = dict[str, SplitPart]
RECORD: TypeAdapter[PartRecord] = TypeAdapter(PartRecord)


@dataclass(frozen=True)
class PartSettings:
    """What all parts of a data set have in common."""

    directory: str
    tokenizer: str
    tokenizer_sha256: str
    vocabulary_size: int
    content: str
    column: str
    validation_percent: float
    packing: str
    row_tokens: int
    dtype: str

    def part_name(self, rows: RowRange, source_hash: str) -> str:
        """A hash of all that the part's content depends on; where files lie is not among it."""
        meaning = {name: value for name, value in asdict(self).items() if name not in ("directory", "tokenizer")}
        key = json.dumps([PART_VERSION, meaning, source_hash, rows.first_row, rows.rows], sort_keys=True)
        return xxhash.xxh3_128_hexdigest(key.encode())


class Document(NamedTuple):
    """A document's token ids, begun by BOS."""

    tokens: np.ndarray
    split: str
    text_bytes: int | None


@dataclass(frozen=True)
class InspectSource:
    """Result: the source's row ranges. Reads its metadata alone."""

    source: str
    column: str
    content: str
    kind: Literal["inspect"] = "inspect"

    def run(self, progress: Progress) -> Any:
        """Raises UserError when the source is unusable."""
        return [asdict(rows) for rows in row_ranges(Path(self.source), self.column, self.content)]


@dataclass(frozen=True)
class HashSource:
    """Result: the file's size and the hash of its content."""

    source: str
    kind: Literal["hash"] = "hash"

    def run(self, progress: Progress) -> Any:
        """Raises UserError when it cannot be read."""
        digest, size = xxhash.xxh3_64(), 0
        try:
            with open(self.source, "rb") as file:
                while chunk := file.read(_HASH_CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    progress(len(chunk))
        except OSError as error:
            raise UserError(f"{self.source}: cannot be read ({error.strerror}); check the file") from error
        return [size, digest.hexdigest()]


@dataclass(frozen=True)
class MakePart:
    """Result: none; the record stands beside the part."""

    name: str
    rows: RowRange
    settings: PartSettings
    kind: Literal["part"] = "part"

    def run(self, progress: Progress) -> Any:
        """Raises UserError for unreadable documents and for a full disk."""
        settings = self.settings
        documents = _text_documents if settings.content == "text" else _token_documents
        directory = Path(settings.directory)
        with writing(directory):
            writers = {split: _SplitWriter(directory, self.name, split, settings) for split in SPLITS}
            try:
                for document in documents(self.rows, settings, progress):
                    writers[document.split].add(document)
                record = {split: writer.finish() for split, writer in writers.items()}
                publish(directory / f"{self.name}.json", RECORD.dump_json(record))
            finally:
                for writer in writers.values():
                    writer.abandon()


@dataclass(frozen=True)
class WriteShard:
    """Result: none; ``entry_file`` with the shard's index entry is the mark of a finished shard.

    ``pieces`` are (file of a part, first row, rows).
    """

    directory: str
    entry_file: str
    number: int
    layout: ShardFormat
    row_tokens: int
    dtype: str
    pieces: list[tuple[str, int, int]]
    kind: Literal["shard"] = "shard"

    def run(self, progress: Progress) -> Any:
        """Raises UserError for a full disk."""
        rows = np.concatenate([read_rows(*piece, self.row_tokens, self.dtype) for piece in self.pieces])
        name, content, entry = encode_shard(self.layout, self.number, rows)
        with writing(Path(self.directory)):
            publish(Path(self.directory) / name, content)
            publish(Path(self.entry_file), json.dumps(entry).encode())
        progress(rows.nbytes)

    def read_entry(self) -> dict[str, Any]:
        """The index entry of the finished shard."""
        wait_to_see(Path(self.entry_file).exists)
        entry: dict[str, Any] = json.loads(Path(self.entry_file).read_text())
        return entry


class _SplitWriter:
    """Packs the documents of one split of a part and writes them as they come."""

    def __init__(self, directory: Path, name: str, split: str, settings: PartSettings) -> None:
        self._path = directory / f"{name}.{split}"
        self._temporary = temporary_path(self._path)
        self._file = self._temporary.open("wb")
        self._packer = packer(settings.packing, settings.row_tokens)
        self._documents = self._rows = 0
        self._text_bytes: int | None = 0

    def add(self, document: Document) -> None:
        self._documents += 1
        if self._text_bytes is not None:
            self._text_bytes = None if document.text_bytes is None else self._text_bytes + document.text_bytes
        self._write(self._packer.add(Piece(document.tokens)))

    def finish(self) -> SplitPart:
        rows, tail = self._packer.finish()
        self._write(rows)
        for piece in tail:
            self._file.write(piece.tokens.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._temporary, self._path)
        lengths = [(len(piece.tokens), piece.continues) for piece in tail]
        return SplitPart(self._documents, self._packer.documents_cut, self._text_bytes, self._rows, lengths)

    def abandon(self) -> None:
        """Leave nothing unfinished behind."""
        with suppress(OSError):  # closing writes what is buffered: on a full disk that fails once more
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, rows: list[np.ndarray]) -> None:
        for row in rows:
            self._file.write(row.tobytes())
        self._rows += len(rows)


def read_record(directory: Path, name: str, row_bytes: int, token_bytes: int) -> PartRecord | None:
    """The record of a part that is there with its full size, or None."""
    try:
        record = RECORD.validate_json((directory / f"{name}.json").read_bytes())
        for split, part in record.items():
            expected_bytes = part.rows * row_bytes + sum(length for length, _ in part.tail) * token_bytes
            if (directory / f"{name}.{split}").stat().st_size != expected_bytes:
                return None
    except (OSError, ValueError):
        return None
    return record


def read_rows(path: str, first_row: int, rows: int, row_tokens: int, dtype: str) -> np.ndarray:
    """Rows of a part's file, of shape (rows, row_tokens)."""
    offset = first_row * row_tokens * np.dtype(dtype).itemsize
    return np.fromfile(path, dtype=dtype, count=rows * row_tokens, offset=offset).reshape(rows, row_tokens)


def read_tail(path: Path, part: SplitPart, settings: PartSettings) -> Iterator[Piece]:
    """The pieces of a part that fill no row."""
    offset = part.rows * settings.row_tokens * np.dtype(settings.dtype).itemsize
    tokens = np.fromfile(path, dtype=settings.dtype, offset=offset)
    ends = np.cumsum([length for length, _ in part.tail], dtype=np.int64)
    for (length, continues), end in zip(part.tail, ends, strict=True):
        yield Piece(tokens[end - length : end], continues)


def _text_documents(rows: RowRange, settings: PartSettings, progress: Progress) -> Iterator[Document]:
    tokenizer = load_tokenizer(Path(settings.tokenizer))
    for batch in _batches(read_texts(rows, settings.column)):
        size = 0
        encodings = tokenizer.encoder.encode_batch_fast(batch, add_special_tokens=False)
        for text, encoding in zip(batch, encodings, strict=True):
            content = text.encode()
            size += len(content)
            ids = encoding.ids
            tokens = np.empty(len(ids) + 1, dtype=settings.dtype)
            tokens[0] = tokenizer.bos
            tokens[1:] = ids
            yield Document(tokens, split_of(content, settings.validation_percent), len(content))
        progress(size)


def _token_documents(rows: RowRange, settings: PartSettings, progress: Progress) -> Iterator[Document]:
    tokenizer = load_tokenizer(Path(settings.tokenizer))
    sizes = text_bytes_of_ids(tokenizer.encoder)
    for ids in read_token_ids(rows, settings.column, settings.vocabulary_size):
        begun = ids if ids[0] == tokenizer.bos else np.concatenate([[tokenizer.bos], ids])
        # The same whatever integers the file holds.
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
