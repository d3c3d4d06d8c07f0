"""Checking a prepared data set: every file against the indexes, the indexes against the manifest."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from data_prep.verify_shard import VerifyShard, stored
from data_prep.workers import Workers
from mythos.data.format import (
    INDEX_FILE,
    MANIFEST_FILE,
    SPLITS,
    Manifest,
    tokenizer_problem,
)
from mythos.data.shards import read_entries
from mythos.errors import UserError

REMEDY = "fetch that file again, or remove {directory} and prepare it again: the same input gives the same bytes"


def verify(directory: Path, workers: Workers, progress: Callable[[int], None]) -> tuple[Manifest, list[str]]:
    """The manifest and a line for each problem, none if the data set is valid.

    Every shard is read to check its hash, its header, and that all ids are below the vocabulary size. Raises UserError
    if the manifest cannot be read.
    """
    manifest = Manifest.load(directory)
    findings, shards = structure(directory, manifest)
    broken = {}
    for number, wrong in workers.run(shards, progress):
        path = f"{shards[number].path}:"
        # structure() has already reported the shards that are missing or have another size.
        if wrong and not any(line.startswith(path) for line in findings):
            broken[number] = f"{path} {wrong}"
    findings += [broken[number] for number in sorted(broken)]
    if problem := tokenizer_problem(directory, manifest):
        findings.append(problem)
    remedy = REMEDY.format(directory=directory)
    return manifest, [f"{finding}; {remedy}" for finding in findings]


def data_bytes(directory: Path) -> int:
    """The size of all existing shards."""
    return sum(path.stat().st_size for split in SPLITS for path in (directory / split).glob("shard.*") if path.exists())


def structure(directory: Path, manifest: Manifest) -> tuple[list[str], list[VerifyShard]]:
    """The problems that are found without reading a shard (sizes, counts, extra files), and the shards to read."""
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
            except FileNotFoundError:
                findings.append(f"{shard.path}: missing, but listed in the index")
            except OSError as error:
                findings.append(f"{shard.path}: cannot be read ({error.strerror})")
        rows = sum(shard.entry["samples"] for shard in own)
        counts = manifest.splits[split]
        if (rows, rows * manifest.row_tokens) != (counts.sequences, counts.tokens):
            findings.append(
                f"{directory / split / INDEX_FILE}: {rows} rows, {rows * manifest.row_tokens} tokens; the manifest has "
                f"{counts.sequences} and {counts.tokens}"
            )
        named = {shard.path for shard in own}
        findings += [
            f"{path}: not listed in the index"
            for path in sorted((directory / split).glob("shard.*"))
            if path not in named
        ]
        shards += own
    return findings, shards


def check_existing(output: Path, plan: Manifest) -> Manifest:
    """The manifest of an existing data set. Raises UserError if it is not the one that was asked for."""
    if not (output / MANIFEST_FILE).exists():
        raise UserError(f"{output}: exists and holds no data set; choose another --output, or remove it")
    manifest = Manifest.load(output)
    for field in fields(Manifest):
        found, asked = getattr(manifest, field.name), getattr(plan, field.name)
        # The special ids follow from the tokenizer; earlier versions did not record them.
        if field.name not in ("splits", "special_ids") and found != asked:
            # There may be too many sources for one line.
            what = "made from other sources" if field.name == "sources" else f"with {field.name} {found}, not {asked}"
            raise UserError(f"{output}: holds a data set {what}; choose another --output or remove it")
    findings, _ = structure(output, manifest)
    if findings:
        raise UserError(f"{findings[0]}; remove {output} and run again, or see `mythos data verify {output}`")
    return manifest


def _read_entries(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The entries of an index that the reader accepts, with the settings that their shards were written with."""
    remedy = "its shards were not checked"
    entries = read_entries(path, manifest, remedy)
    for number, entry in enumerate(entries):
        if entry["size_limit"] is None:
            raise UserError(f"{path}: shard {number}: damaged entry (size_limit); {remedy}")
    return entries
