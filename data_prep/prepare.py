"""Documents -> rows -> MDS shards, as described in mythos/data/format.py.

    sources ──► row ranges ──► parts (rows and tail of each split) ──► shards of equal size ──► DIR
               of ~16 MB       by the workers, in any order            by the workers

The tails of all parts, less than a row each, are packed together in order. So the data set depends on the sources and
the settings alone, not on the number of processes or on kills. Everything is written to the hidden directory
.DIR.partial beside DIR; the complete data set is renamed to DIR, and the rest is removed. A killed run leaves its
finished parts there, and the next run continues with them.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_prep.documents import RowRange, check_validation_percent
from data_prep.encoding import ENCODED_AS_A_WHOLE
from data_prep.lock import locked_directory
from data_prep.parts import (
    FREE_SPACE,
    MakePart,
    PartRecord,
    PartSettings,
    SplitWriter,
    read_record,
    read_tail,
    wait_until_visible,
)
from data_prep.progress import Progress
from data_prep.shards import LARGEST_SHARD_MIB, ShardFormat, WriteShard, deal, write_index
from data_prep.sources import expanded, hashed, report_empty, row_ranges_of, stamp
from data_prep.tokenizer_file import TokenizerFile, agreed_validation_percent, load_tokenizer
from data_prep.verify import check_existing
from data_prep.workers import Workers
from mythos.data.format import (
    BOS,
    SPLITS,
    TOKENIZER_FILE,
    Manifest,
    Settings,
    SplitCounts,
    token_dtype,
)
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import is_temporary, opened_atomically, write_atomically
from mythos.run.console import print_note

_TAILS = "tails"  # the part that is made from the tails of the others


def prepare(
    sources: list[Path],
    tokenizer: Path,
    output: Path,
    sequence_length: int,
    settings: Settings,
    workers: Workers,
) -> tuple[Manifest, bool]:
    """Write both splits into ``output``; returns the manifest and whether it is new.

    If ``output`` already holds a data set made from the same sources with the same settings, nothing is done.

    Raises:
        UserError: unusable input, an output with other settings or that another run is writing, a split too small for
            one row, a full disk. Its subclass WorkerLost: a process died.
    """
    _check(sequence_length, settings)
    output = Path(os.path.realpath(output))  # a directory cannot be renamed over a link
    if os.path.ismount(output):
        raise UserError(f"{output}: is a mount point; choose a directory below it as --output")
    sources = expanded(sources)
    encoder = load_tokenizer(tokenizer, settings.bos)
    if settings.content == "text" and not encoder.cut:
        print_note(f"{tokenizer}: {ENCODED_AS_A_WHOLE}")
    ranges = row_ranges_of(sources, settings, workers)
    report_empty(sources, ranges)
    stamps = {source: stamp(source) for source in sources}
    plan = Manifest(
        sequence_length=sequence_length,
        vocabulary_size=encoder.vocabulary_size,
        tokenizer_sha256=encoder.sha256,
        sources=tuple(hashed(sources, workers)),
        settings=settings,
        splits={},
        special_ids=encoder.special_ids,
    )
    work = output.with_name(f".{output.name}.partial")
    if _is_occupied(output):
        manifest = check_existing(output, plan)
        if work.exists():  # the run was killed between its last two steps
            with os_errors_as_user_errors(work, FREE_SPACE), suppress(UserError), locked_directory(work):
                shutil.rmtree(work)
        return manifest, False
    with os_errors_as_user_errors(work, FREE_SPACE), locked_directory(work):
        if _is_occupied(output):  # another run finished it just before the lock was released
            shutil.rmtree(work)
            return check_existing(output, plan), False
        run = _Run(work, plan, stamps, encoder, workers)
        try:
            manifest = run.make(ranges, output)
        except BaseException as error:
            workers.end(error)  # before tidying up, because they may still be writing
            run.tidy()
            raise
    return manifest, True


def settings_for(tokenizer: Path, asked_validation_percent: float | None, **settings: Any) -> Settings:
    """Settings with a validation percentage that suits the tokenizer. Raises UserError if the given one does not."""
    if asked_validation_percent is not None:
        check_validation_percent(asked_validation_percent)
    sha256 = load_tokenizer(tokenizer, settings.get("bos", BOS)).sha256
    percent = agreed_validation_percent(tokenizer, sha256, asked_validation_percent)
    return Settings(validation_percent=float(percent), **settings)


class _Run:
    """One run that holds the lock."""

    def __init__(
        self, work: Path, plan: Manifest, stamps: Mapping[Path, object], tokenizer: TokenizerFile, workers: Workers
    ) -> None:
        self._work, self._plan, self._tokenizer, self._workers = work, plan, tokenizer, workers
        self._stamps = stamps
        self._parts = work / "parts"
        token_bytes = np.dtype(token_dtype(plan.vocabulary_size)).itemsize
        self._row_bytes = plan.row_tokens * token_bytes
        self._token_bytes = token_bytes
        self._part_settings = PartSettings(
            directory=str(self._parts),
            tokenizer=str(work / TOKENIZER_FILE),
            tokenizer_sha256=plan.tokenizer_sha256,
            bos=plan.settings.bos,
            special_ids=tokenizer.special_ids,
            vocabulary_size=plan.vocabulary_size,
            content=plan.settings.content,
            column=plan.settings.column,
            validation_percent=plan.settings.validation_percent,
            packing=plan.settings.packing,
            row_tokens=plan.row_tokens,
            dtype=token_dtype(plan.vocabulary_size),
        )

    def make(self, ranges: list[list[RowRange]], output: Path) -> Manifest:
        self._parts.mkdir(exist_ok=True)
        self._remove_unfinished()
        write_atomically(self._work / TOKENIZER_FILE, self._tokenizer.content)
        names = self._make_parts(ranges)
        records = [self._record(name) for name in names]
        splits = {split: self._pack_tails(split, names, records) for split in SPLITS}
        for split in SPLITS:
            self._check_filled(split, splits[split])
        made = list(zip(names, records, strict=True))
        rows = {split: [(name, record[split].rows) for name, record in made] for split in SPLITS}
        data = self._write_shards(rows, splits)
        manifest = replace(self._plan, splits=splits)
        write_atomically(data / TOKENIZER_FILE, self._tokenizer.content)
        manifest.save(data)
        # Fails if another process has created the directory meanwhile, so its content is kept.
        os.rename(data, output)
        shutil.rmtree(self._work)
        return manifest

    def tidy(self) -> None:
        """After a failure, keep finished work and remove everything else."""
        self._remove_unfinished()
        if not any(self._parts.glob("*.json")):
            shutil.rmtree(self._work, ignore_errors=True)

    def _make_parts(self, ranges: list[list[RowRange]]) -> list[str]:
        settings = self._part_settings
        parts = [
            MakePart(settings.part_name(rows, source.xxh3_64), rows, settings)
            for source, source_ranges in zip(self._plan.sources, ranges, strict=True)
            for rows in source_ranges
        ]
        # A source that is given twice has the same parts twice.
        missing = list({part.name: part for part in parts if not self._is_made(part.name)}.values())
        total = sum(part.rows.bytes for part in parts)
        left = sum(part.rows.bytes for part in missing)
        with Progress("tokenising" if settings.content == "text" else "importing", total, total - left) as progress:
            for _ in self._workers.run(missing, progress):
                pass
        for source, before in self._stamps.items():
            if stamp(source) != before:
                raise UserError(f"{source}: was written to while it was read; run again once it is complete")
        return [part.name for part in parts]

    def _is_made(self, name: str) -> bool:
        return read_record(self._parts, name, self._row_bytes, self._token_bytes) is not None

    def _record(self, name: str) -> PartRecord:
        wait_until_visible(lambda: self._is_made(name))
        record = read_record(self._parts, name, self._row_bytes, self._token_bytes)
        if record is None:
            raise UserError(
                f"{self._parts / name}: written by a worker, but not visible here; --output must be on a file system "
                "that all nodes share"
            )
        return record

    def _pack_tails(self, split: str, names: list[str], records: list[PartRecord]) -> SplitCounts:
        """Make the last part from the remaining pieces; returns the counts of the complete split."""
        with opened_atomically(self._parts / f"{_TAILS}.{split}") as file:
            writer = SplitWriter(file, self._part_settings)
            for name, record in zip(names, records, strict=True):
                for piece in read_tail(self._parts / f"{name}.{split}", record[split], self._part_settings):
                    writer.pack(piece)
            tails = writer.finish()
        parts = [*(record[split] for record in records), tails]
        text_bytes = [part.text_bytes for part in parts]
        sequences = sum(part.rows for part in parts)
        return SplitCounts(
            documents=sum(part.documents for part in parts),
            text_bytes=None if None in text_bytes else sum(size for size in text_bytes if size is not None),
            sequences=sequences,
            tokens=sequences * self._plan.row_tokens,
            tokens_dropped=sum(part.tokens_dropped for part in parts) + sum(length for length, _ in tails.tail),
            documents_cut=sum(part.documents_cut for part in parts) + sum(not continues for _, continues in tails.tail),
            positions=sequences * self._plan.sequence_length,
            text_tokens=sum(part.text_tokens for part in parts),
        )

    def _check_filled(self, split: str, counts: SplitCounts) -> None:
        if not counts.sequences:
            names = ", ".join(source.name for source in self._plan.sources[:3])
            more = f" and {len(self._plan.sources) - 3} more" if len(self._plan.sources) > 3 else ""
            raise UserError(
                f"{names}{more}: {split} split: {counts.documents} documents give {counts.tokens_dropped} tokens, too "
                f"few for one row of {self._plan.row_tokens}; give more documents, a shorter --sequence-length or "
                "another --validation-percent"
            )

    def _write_shards(self, rows: dict[str, list[tuple[str, int]]], splits: dict[str, SplitCounts]) -> Path:
        """Write the shards and indexes; returns their directory, which needs only tokenizer and manifest now."""
        layout = ShardFormat(
            self._plan.encoding,
            self._row_bytes,
            self._plan.settings.shard_size_mib << 20,
            self._plan.settings.compression,
        )
        # Shards of a killed run are reused only if all parts and settings are the same.
        identity = xxhash.xxh3_64_hexdigest(repr((rows, layout)).encode())
        data, entries = self._work / f"data-{identity}", self._work / f"entries-{identity}"
        items: list[WriteShard] = []
        for split in SPLITS:
            (data / split).mkdir(parents=True, exist_ok=True)
            (entries / split).mkdir(parents=True, exist_ok=True)
            tail_rows = splits[split].sequences - sum(count for _, count in rows[split])
            for number, pieces in enumerate(deal([*rows[split], (_TAILS, tail_rows)], layout.rows_a_shard)):
                items.append(
                    WriteShard(
                        directory=str(data / split),
                        entry_file=str(entries / split / f"{number}.json"),
                        number=number,
                        layout=layout,
                        row_tokens=self._plan.row_tokens,
                        dtype=self._part_settings.dtype,
                        pieces=[(str(self._parts / f"{name}.{split}"), first, count) for name, first, count in pieces],
                    )
                )
        missing = [item for item in items if not os.path.exists(item.entry_file)]
        sizes = [sum(count for *_, count in item.pieces) * self._row_bytes for item in missing]
        with Progress("writing shards", sum(sizes)) as progress:
            for _ in self._workers.run(missing, progress):
                pass
        for split in SPLITS:
            own = [item for item in items if item.directory == str(data / split)]
            write_index(data / split, [item.read_entry() for item in own])
        return data

    def _remove_unfinished(self) -> None:
        for path in self._work.rglob("*"):
            if is_temporary(path):
                path.unlink(missing_ok=True)


def _check(sequence_length: int, settings: Settings) -> None:
    if sequence_length < 1:
        raise UserError(f"--sequence-length {sequence_length}: give at least 1 token")
    if not 1 <= settings.shard_size_mib <= LARGEST_SHARD_MIB:
        raise UserError(f"--shard-size-mib {settings.shard_size_mib}: give 1 to {LARGEST_SHARD_MIB}")
    check_validation_percent(settings.validation_percent)


def _is_occupied(output: Path) -> bool:
    return output.exists() and not (output.is_dir() and not any(output.iterdir()))
