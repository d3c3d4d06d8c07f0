"""Parquet text -> token rows -> MDS shards, as mythos/data/format.py describes them.

Everything is written into a hidden directory beside the output and renamed into place at the end, because MDSWriter
leaves a valid-looking index even after an exception: a data set is there completely or not at all.
"""

import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import xxhash
from tokenizers import Tokenizer
from tqdm import tqdm

from data_prep.documents import count_documents, read_documents, split_of
from mythos.data.format import (
    BOS,
    COLUMN,
    SHARD_HASH,
    SPLITS,
    TOKENIZER_FILE,
    Manifest,
    Settings,
    Source,
    SplitCounts,
    token_dtype,
)
from mythos.data.stream import TokenDataset
from mythos.errors import UserError

# Text handed to the tokenizer's threads at a time: enough to keep them busy, little enough to bound memory.
_BATCH_CHARACTERS = 4 << 20
_LARGEST_SHARD_MIB = 4095  # MDS offsets are uint32


def prepare(
    sources: list[Path],
    column: str,
    tokenizer: Path,
    output: Path,
    sequence_length: int,
    validation_percent: float,
    shard_size_mib: int = 32,
) -> tuple[Manifest, bool]:
    """Tokenise, pack and write both splits into ``output``; return the manifest and whether it was made just now.

    Each document is begun by BOS; a split's documents are laid end to end and cut into rows of sequence_length + 1
    tokens; the unfinished last row is dropped and counted in the manifest. When ``output`` holds a data set made from
    the same sources with the same settings, nothing is done. Raises UserError for unusable input, for an output
    with other settings, and for a split too small for one row.
    """
    if sequence_length < 1:
        raise UserError(f"sequence-length {sequence_length}: give at least 1 token")
    if not 1 <= shard_size_mib <= _LARGEST_SHARD_MIB:
        raise UserError(f"shard-size-mib {shard_size_mib}: give 1 to {_LARGEST_SHARD_MIB}")
    output = Path(os.path.abspath(output))
    documents = count_documents(sources, column)
    encoder, tokenizer_text = _load_tokenizer(tokenizer)
    plan = Manifest(
        sequence_length=sequence_length,
        vocabulary_size=max(encoder.get_vocab().values()) + 1,
        tokenizer_sha256=hashlib.sha256(tokenizer_text).hexdigest(),
        sources=tuple(_describe(source) for source in sources),
        settings=Settings(column, float(validation_percent), shard_size_mib),
        splits={},
    )
    try:
        if output.is_dir() and any(output.iterdir()):
            return _existing(output, plan), False
        _remove_stale(output)
        temporary = output.with_name(f"{_temporary_prefix(output)}{os.getpid()}")
        temporary.mkdir(parents=True)
        try:
            texts = tqdm(read_documents(sources, column), total=documents, unit=" documents", disable=None)
            manifest = _write_splits(temporary, plan, encoder, texts)
            (temporary / TOKENIZER_FILE).write_bytes(tokenizer_text)
            manifest.save(temporary)
            _flush_to_disk(temporary)
            # Fails, and so keeps the other's work, if another process put a data set here meanwhile.
            os.rename(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error}); free space or name another --output") from error
    return manifest, True


def _write_splits(directory: Path, plan: Manifest, encoder: Tokenizer, texts: Iterator[str]) -> Manifest:
    bos = encoder.token_to_id(BOS)
    writers = {split: _SplitWriter(directory / split, plan) for split in SPLITS}
    for batch in _batches(texts):
        for text, encoding in zip(batch, encoder.encode_batch_fast(batch, add_special_tokens=False), strict=True):
            split = split_of(text, plan.settings.validation_percent)
            writers[split].add([bos, *encoding.ids], text_bytes=len(text.encode()))
    return replace(plan, splits={split: writer.finish(split) for split, writer in writers.items()})


class _SplitWriter:
    """Packs documents into rows and writes them as MDS shards. Holds one unfinished row and one shard in memory."""

    def __init__(self, directory: Path, plan: Manifest) -> None:
        from streaming import MDSWriter  # here, because it takes 5 s

        self._row_tokens = plan.row_tokens
        self._unfinished_row = np.empty(0, dtype=token_dtype(plan.vocabulary_size))
        self._documents = self._text_bytes = self._sequences = 0
        self._shards = MDSWriter(
            columns={COLUMN: plan.encoding},
            out=str(directory),
            hashes=[SHARD_HASH],
            size_limit=plan.settings.shard_size_mib << 20,
        )

    def add(self, document: list[int], text_bytes: int) -> None:
        tokens = np.concatenate([self._unfinished_row, np.array(document, dtype=self._unfinished_row.dtype)])
        row_count = len(tokens) // self._row_tokens
        finished = row_count * self._row_tokens
        for row in tokens[:finished].reshape(row_count, self._row_tokens):
            self._shards.write({COLUMN: row})
        self._unfinished_row = tokens[finished:]
        self._documents += 1
        self._text_bytes += text_bytes
        self._sequences += row_count

    def finish(self, split: str) -> SplitCounts:
        if not self._sequences:
            raise UserError(
                f"{split} split: {self._documents} documents give {len(self._unfinished_row)} tokens, too few for one "
                f"row of {self._row_tokens}; give more documents, a shorter --sequence-length or another "
                "--validation-percent"
            )
        self._shards.finish()
        return SplitCounts(
            documents=self._documents,
            text_bytes=self._text_bytes,
            sequences=self._sequences,
            tokens=self._sequences * self._row_tokens,
            tokens_dropped=len(self._unfinished_row),
        )


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


def _load_tokenizer(path: Path) -> tuple[Tokenizer, bytes]:
    """The tokenizer and the bytes of its file."""
    remedy = "train one by `mythos data tokenizer`"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; {remedy}") from error
    try:
        tokenizer = Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise UserError(f"{path}: not a tokenizer file ({error}); {remedy}") from error
    if tokenizer.token_to_id(BOS) is None:
        raise UserError(f"{path}: has no token {BOS}; {remedy}")
    # A document that holds the letters of a special token gets their plain tokens: BOS marks a beginning, only.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, content


def _describe(source: Path) -> Source:
    digest = xxhash.xxh3_64()
    with source.open("rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return Source(name=source.name, bytes=source.stat().st_size, xxh3_64=digest.hexdigest())


def _existing(output: Path, plan: Manifest) -> Manifest:
    """The manifest of a data set that is there already. Raises UserError if it is not the one that was asked for."""
    manifest = Manifest.load(output)
    for field in fields(Manifest):
        found, asked = getattr(manifest, field.name), getattr(plan, field.name)
        if field.name != "splits" and found != asked:
            # Sources can be many; their list would be no line.
            what = "made from other sources" if field.name == "sources" else f"with {field.name} {found}, not {asked}"
            raise UserError(f"{output}: holds a data set {what}; name another --output or remove it")
    for split in SPLITS:
        TokenDataset(output, split)  # names a shard that is missing or cut
    return manifest


def _temporary_prefix(output: Path) -> str:
    return f".{output.name}.partial.{socket.gethostname()}."


def _remove_stale(output: Path) -> None:
    """Remove what killed runs on this machine left of this output. The process id in the name tells a living one."""
    prefix = _temporary_prefix(output)
    for path in output.parent.iterdir() if output.parent.is_dir() else ():
        owner = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and owner.isdecimal() and not _is_alive(int(owner)):
            shutil.rmtree(path)


def _is_alive(process_id: int) -> bool:
    if process_id == os.getpid():
        return False  # the id came round again: this process has written nothing yet
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flush_to_disk(directory: Path) -> None:
    """So that after a power cut no complete-looking directory holds empty shards."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
