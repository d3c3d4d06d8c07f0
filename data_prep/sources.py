"""The Parquet files that a data set is made from: looked at, hashed, and watched for changes."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.documents import RowRange
from data_prep.parts import HashSource, InspectSource
from data_prep.progress import Progress
from data_prep.workers import Workers
from mythos.data.format import Settings, Source


def row_ranges_of(sources: list[Path], settings: Settings, workers: Workers) -> list[list[RowRange]]:
    """Each source's row ranges. All are looked at before any long work: a wrong one is not found out after hours."""
    items = [InspectSource(str(source), settings.column, settings.content) for source in sources]
    results = dict(workers.run(items, lambda done_bytes: None))
    return [[RowRange(**rows) for rows in results[number]] for number in range(len(items))]


def stamp(source: Path) -> tuple[int, int] | None:
    """What tells that a file was written to; None where it is gone."""
    try:
        status = source.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def hashed(sources: list[Path], workers: Workers) -> Iterator[Source]:
    """Name, size and hash of each."""
    total = sum(source.stat().st_size for source in sources)
    with Progress("hashing the sources", total) as progress:
        results = dict(workers.run([HashSource(str(source)) for source in sources], progress))
    for number, source in enumerate(sources):
        size, digest = results[number]
        yield Source(name=source.name, bytes=size, xxh3_64=digest)
