"""The files that a data set is made from: inspecting, hashing, and detecting changes."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.documents import RowRange
from data_prep.parts import HashSource, InspectSource
from data_prep.progress import Progress
from data_prep.workers import Workers
from mythos.data.format import Settings, Source
from mythos.errors import UserError
from mythos.run.console import print_note


def expanded(sources: Sequence[Path]) -> list[Path]:
    """The sources as absolute paths; a directory stands for the Parquet files below it, in the order of their names."""
    files: list[Path] = []
    for source in sources:
        source = Path(os.path.abspath(source))
        if source.is_dir():
            below = sorted(path for path in source.glob("**/*.parquet") if path.is_file())
            if not below:
                raise UserError(f"{source}: a directory without Parquet files (*.parquet); check the path")
            files += below
        else:
            files.append(source)
    return files


def report_empty(sources: Sequence[Path], ranges: Sequence[list[RowRange]]) -> None:
    """Name the sources that hold no documents, in one line."""
    empty = [str(source) for source, source_ranges in zip(sources, ranges, strict=True) if not source_ranges]
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        print_note(f"left out, no documents: {', '.join(empty[:3])}{more}")


def row_ranges_of(sources: list[Path], settings: Settings, workers: Workers) -> list[list[RowRange]]:
    """The row ranges of each source. All are inspected first, so that a bad file is not found after hours of work."""
    items = [InspectSource(str(source), settings.column, settings.content) for source in sources]
    results = dict(workers.run(items, lambda done_bytes: None))
    return [[RowRange(**rows) for rows in results[number]] for number in range(len(items))]


def stamp(source: Path) -> tuple[int, int] | None:
    """A value that changes when the file is written to; None if it does not exist."""
    try:
        status = source.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def hashed(sources: list[Path], workers: Workers) -> Iterator[Source]:
    """Name, size and hash of each source."""
    total = sum(source.stat().st_size for source in sources)
    with Progress("hashing the sources", total) as progress:
        results = dict(workers.run([HashSource(str(source)) for source in sources], progress))
    for number, source in enumerate(sources):
        size, digest = results[number]
        yield Source(name=source.name, bytes=size, xxh3_64=digest)
