"""Is a prepared data set whole: every file against the indexes, the indexes against the manifest."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_prep.verify_shard import VerifyShard, stored
from data_prep.workers import Workers
from mythos.data.format import (
    INDEX_FILE,
    SPLITS,
    TOKENIZER_FILE,
    Manifest,
    parse_json_object,
    read_data_file,
)
from mythos.data.shards import read_index
from mythos.errors import UserError

REMEDY = "fetch that file again, or remove {directory} and prepare it again: the same input gives the same bytes"


def verify(directory: Path, workers: Workers, progress: Callable[[int], None]) -> tuple[Manifest, list[str]]:
    """The manifest and a line for each thing that is wrong, none when the data set is whole.

    Every shard is read: its hash, its header, and that all ids are below the vocabulary. Raises UserError when there is
    no readable manifest.
    """
    manifest = Manifest.load(directory)
    findings, shards = structure(directory, manifest)
    broken = {}
    for number, wrong in workers.run(shards, progress):
        if wrong:
            broken[number] = f"{shards[number].path}: {wrong}"
    # structure() has already named a shard that is missing or has another size.
    named = {line.split(":")[0] for line in findings}
    findings += [broken[number] for number in sorted(broken) if str(shards[number].path) not in named]
    findings += _tokenizer_findings(directory, manifest)
    remedy = REMEDY.format(directory=directory)
    return manifest, [f"{finding}; {remedy}" for finding in findings]


def data_bytes(directory: Path) -> int:
    """The size of all shards that are there."""
    return sum(path.stat().st_size for split in SPLITS for path in (directory / split).glob("shard.*") if path.exists())


def structure(directory: Path, manifest: Manifest) -> tuple[list[str], list[VerifyShard]]:
    """What is wrong without reading a shard (sizes, counts, files that do not belong), and the shards to read."""
    findings: list[str] = []
    shards: list[VerifyShard] = []
    for split in SPLITS:
        try:
            entries = _read_entries(directory / split / INDEX_FILE, manifest)
        except UserError as error:
            findings.append(str(error))
            continue
        own = [VerifyShard(str(directory / split), entry, manifest.vocabulary_size) for entry in entries]
        for shard in own:
            try:
                size, expected = shard.path.stat().st_size, stored(shard.entry)["bytes"]
                if size != expected:
                    findings.append(f"{shard.path}: {size} bytes, the index says {expected}")
            except OSError as error:
                findings.append(f"{shard.path}: the index names it, but {error.strerror}")
        rows = sum(shard.entry["samples"] for shard in own)
        counts = manifest.splits[split]
        if (rows, rows * manifest.row_tokens) != (counts.sequences, counts.tokens):
            findings.append(
                f"{directory / split / INDEX_FILE}: {rows} rows, {rows * manifest.row_tokens} tokens; the manifest has "
                f"{counts.sequences} and {counts.tokens}"
            )
        named = {shard.path for shard in own}
        findings += [
            f"{path}: no shard of the index"
            for path in sorted((directory / split).glob("shard.*"))
            if path not in named
        ]
        shards += own
    return findings, shards


def _read_entries(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The entries of an index, which the reader takes, and which say how their shards were written."""
    remedy = "its shards were not looked at"
    read_index(path, manifest, remedy)
    entries: list[dict[str, Any]] = parse_json_object(path, read_data_file(path), remedy)["shards"]
    for number, entry in enumerate(entries):
        if not isinstance(entry.get("size_limit"), int):
            raise UserError(f"{path}: shard {number}: damaged entry (size_limit); {remedy}")
    return entries


def _tokenizer_findings(directory: Path, manifest: Manifest) -> list[str]:
    path = directory / TOKENIZER_FILE
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror})"]
    if found != manifest.tokenizer_sha256:
        return [f"{path}: not the tokenizer that made the ids (sha256 {found}, the manifest has another)"]
    return []
