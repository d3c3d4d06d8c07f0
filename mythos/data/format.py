"""The format of a prepared data set: shared by the writer (data_prep) and the reader (dataset.py).

    DIR/tokenizer.json                       the tokenizer that made the ids
    DIR/manifest.json                        what the data set holds; written last, so it marks a complete data set
    DIR/train/{index.json,shard.*.mds}       MDS shards with one column `tokens`; shard.*.mds.zstd if compressed
    DIR/validation/{index.json,shard.*.mds}

A row is ``sequence_length + 1`` token ids: inputs are ``row[:-1]``, targets are ``row[1:]``. Every row is full, and
each document begins with the BOS token; data_prep/packing.py decides which documents share a row.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter

from mythos.errors import UserError
from mythos.files import read_bytes, write_atomically
from mythos.readers import LARGE_FILE_BYTES, Count, json_object, parse_json, read_utf8

FORMAT_VERSION = 2
SPLITS = ("train", "validation")
COLUMN = "tokens"
BOS = "<|bos|>"
TOKENIZER_FILE = "tokenizer.json"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.json"
SHARD_HASH = "xxh3_64"

_STRICT = ConfigDict(extra="forbid", strict=True)


def token_dtype(vocabulary_size: int) -> str:
    """uint16 or uint32, the smaller that holds every id. Returns the name, to avoid importing numpy at start-up."""
    return "uint16" if vocabulary_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Source:
    """One file that the documents came from."""

    __pydantic_config__ = _STRICT

    name: str
    bytes: Count
    xxh3_64: str


@dataclass(frozen=True)
class Settings:
    """The options of `mythos data prepare` or `import`, except the sequence length and the tokenizer."""

    __pydantic_config__ = _STRICT

    column: str
    validation_percent: FiniteFloat
    shard_size_mib: Count
    packing: Literal["straight", "best_fit", "crop"] = "straight"
    compression: Literal["zstd"] | None = None
    content: Literal["text", "token_ids", "synthetic"] = "text"
    """What the column holds: text, or the token ids of an earlier tokenisation; synthetic problems have no column."""
    bos: str = BOS
    """The token that begins each document."""


@dataclass(frozen=True)
class SplitCounts:
    """The size of one split. ``tokens`` counts those in rows, ``tokens_dropped`` all others.

    Others are those of the incomplete last row, and what was cut off from documents by the packing ``crop``.
    ``text_bytes`` is None for imported token ids of a tokenizer that is not byte-level. ``documents_cut`` counts the
    documents that are split over several rows or not in the rows with all of their tokens. An epoch trains on
    ``positions``, one for each target; at ``text_tokens`` of them the target is text, not a special token.
    """

    __pydantic_config__ = _STRICT

    documents: Count
    text_bytes: Count | None
    sequences: Count
    tokens: Count
    tokens_dropped: Count
    documents_cut: Count
    positions: Count | None = None
    """None, like ``text_tokens``, if an earlier version prepared the data."""
    text_tokens: Count | None = None
    counted_targets: Count | None = None
    """Targets that the loss counts, where only answers do; None: all."""

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of text per token, BOS tokens included: converts nats per token to bits per byte."""
        return None if self.text_bytes is None else self.text_bytes / (self.tokens + self.tokens_dropped)


@dataclass(frozen=True)
class Answers:
    """Only answers count in the loss: the targets between each ``begin_id`` and the next ``end_id``."""

    __pydantic_config__ = _STRICT

    begin_id: Count
    end_id: Count


@dataclass(frozen=True)
class Synthetic:
    """What `mythos data synthetic` made.

    Validation has ``validation_rows`` rows of difficulty 1, then as many of difficulty 2, up to ``most_difficult``;
    training has difficulties up to ``trained_difficulty``.
    """

    __pydantic_config__ = _STRICT

    task: str
    trained_difficulty: Annotated[int, Field(ge=1)]
    most_difficult: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1)]
    validation_rows: Annotated[int, Field(ge=1)]
    seed: Count


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    __pydantic_config__ = _STRICT

    sequence_length: Annotated[int, Field(ge=1, le=2**31)]
    vocabulary_size: Annotated[int, Field(ge=1, le=2**32)]
    tokenizer_sha256: str
    sources: tuple[Source, ...]
    settings: Settings
    splits: dict[str, SplitCounts]
    format_version: int = FORMAT_VERSION
    special_ids: tuple[Count, ...] | None = None
    """The ids that stand for no text, such as BOS; None if an earlier version prepared the data."""
    answers: Answers | None = None
    """None: all targets count in the loss."""
    synthetic: Synthetic | None = None

    @property
    def row_tokens(self) -> int:
        """Number of token ids in a row."""
        return self.sequence_length + 1

    @property
    def encoding(self) -> str:
        """The MDS encoding of the column `tokens`."""
        return f"ndarray:{token_dtype(self.vocabulary_size)}:{self.row_tokens}"

    def save(self, directory: Path) -> None:
        """Write DIR/manifest.json atomically."""
        write_atomically(directory / MANIFEST_FILE, _MANIFEST.dump_json(self, indent=2).decode() + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read DIR/manifest.json. Raises UserError if it is missing, damaged or of another version."""
        path = directory / MANIFEST_FILE
        text = read_data_file(path)
        remedy = f"remove {directory} and run `mythos data prepare` again"
        version = json_object(path, text, remedy).get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format_version is {version!r}, this Mythos reads {FORMAT_VERSION}; {remedy}")
        manifest = parse_json(path, text, _MANIFEST, remedy)
        if set(manifest.splits) != set(SPLITS):
            raise UserError(f"{path}: splits are {sorted(manifest.splits)}, expected {list(SPLITS)}; {remedy}")
        return manifest


_MANIFEST = TypeAdapter(Manifest)


def fingerprint(directory: Path) -> str:
    """A sha256 that identifies the data independently of its path, so that a resumed run detects other data.

    It covers both index files, which hold the size and hash of every shard, and the fields that give the ids meaning.
    Raises UserError if the manifest or an index is missing.
    """
    manifest = Manifest.load(directory)
    meaning = [
        manifest.format_version,
        manifest.sequence_length,
        manifest.vocabulary_size,
        manifest.tokenizer_sha256,
    ]
    if manifest.answers is not None:
        meaning += [manifest.answers.begin_id, manifest.answers.end_id]
    digest = hashlib.sha256(json.dumps(meaning).encode())
    for split in SPLITS:
        # Each is hashed by itself first, so that moving bytes from one index to the other changes the result.
        digest.update(hashlib.sha256(read_data_file(directory / split / INDEX_FILE).encode()).digest())
    return digest.hexdigest()


def tokenizer_problem(directory: Path, manifest: Manifest) -> str | None:
    """What is wrong with the tokenizer of a data set, naming the file; None if it is the one that made the ids."""
    path = directory / TOKENIZER_FILE
    try:
        found = hashlib.sha256(read_bytes(path, LARGE_FILE_BYTES)).hexdigest()
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    if found != manifest.tokenizer_sha256:
        return (
            f"{path}: not the tokenizer that made the ids (sha256 {found[:12]}, the manifest has "
            f"{manifest.tokenizer_sha256[:12]})"
        )
    return None


def read_data_file(path: Path) -> str:
    """The text of a file of a prepared data set. Raises UserError naming the file."""
    if not path.exists():
        raise UserError(
            f"{path}: no such file, so the data set is incomplete; check the path or run `mythos data prepare`"
        )
    return read_utf8(path, "run `mythos data prepare` again", LARGE_FILE_BYTES)
