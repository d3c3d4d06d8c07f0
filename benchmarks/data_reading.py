"""Tokens a second and CPU time of the stream, compared with a numpy memmap and StreamingDataset on the same tokens.

The readers take turns, each time in a new process; the best of several rounds is printed. The page cache is warm,
except for the lines marked `cold`, before which the shards' pages were dropped.

python -m benchmarks.data_reading [--tokens MILLIONS] [--sequence-length TOKENS] [--directory DIR]
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mythos.data.dataset import TokenDataset
from mythos.data.format import COLUMN, SHARD_HASH, SPLITS, Manifest, Settings, SplitCounts
from mythos.data.stream import Source, TokenStream

BATCH = 16
VOCABULARY = 32_768
ROUNDS = 3


def write(directory: Path, rows: int, sequence_length: int, shards: int) -> None:
    """Write a data set of random ids in about ``shards`` shards, and the same rows as a plain file."""
    from streaming import MDSWriter

    counts = {split: SplitCounts(1, 1, rows, rows * (sequence_length + 1), 0, 0) for split in SPLITS}
    manifest = Manifest(sequence_length, VOCABULARY, "0" * 64, (), Settings("text", 1.0, 1), counts)
    generator = np.random.default_rng(0)
    for split, number in (("train", rows), ("validation", 1)):
        writer = MDSWriter(
            columns={COLUMN: manifest.encoding},
            out=str(directory / split),
            hashes=[SHARD_HASH],
            size_limit=max(rows * (sequence_length + 1) * 2 // shards, 3 * (sequence_length + 1) * 2),
        )
        with (directory / f"{split}.bin").open("wb") as plain:
            for _ in range(number):
                row = generator.integers(VOCABULARY, size=sequence_length + 1, dtype=np.uint16)
                writer.write({COLUMN: row})
                row.tofile(plain)
        writer.finish()
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    manifest.save(directory)


def read_memmap(directory: Path, rows: int, sequence_length: int) -> int:
    """A permutation of the rows, one slice each: the lower bound with numpy."""
    shape = (rows, sequence_length + 1)
    matrix = np.memmap(directory / "train.bin", dtype="<u2", mode="r", shape=shape)
    order, tokens = np.random.default_rng(1).permutation(rows), 0
    for first in range(0, rows - BATCH + 1, BATCH):
        batch = np.empty((BATCH, sequence_length + 1), dtype=np.int64)
        for place, row in enumerate(order[first : first + BATCH]):
            batch[place] = matrix[row]
        tokens += batch.size
    return tokens


def read_ours(directory: Path, rows: int, sequence_length: int) -> int:
    """One epoch of the stream, with hashes checked."""
    stream, tokens = open_ours(directory), 0
    for first in range(0, rows - BATCH + 1, BATCH):
        tokens += stream.rows(first, BATCH).size
    stream.close()
    return tokens


def read_streaming(directory: Path, rows: int, sequence_length: int) -> int:
    """One epoch of StreamingDataset, shuffled, without workers (its fastest form), in batches of int64."""
    tokens, batch = 0, []
    for sample in open_streaming(directory):
        batch.append(sample[COLUMN])
        if len(batch) == BATCH:
            tokens += np.stack(batch).astype(np.int64).size
            batch = []
    return tokens


def open_ours(directory: Path) -> TokenStream:
    return TokenStream([Source("data", 1.0, TokenDataset(directory, "train"))], 1, 32)


def open_streaming(directory: Path) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(local=str(directory), split="train", shuffle=True, batch_size=BATCH, num_canonical_nodes=1)


def start_ours(directory: Path, rows: int, sequence_length: int) -> int:
    """Construct and read the first batch."""
    stream = open_ours(directory)
    return stream.rows(0, BATCH).size


def start_streaming(directory: Path, rows: int, sequence_length: int) -> int:
    """Construct and read the first batch."""
    found = iter(open_streaming(directory))
    return sum(next(found)[COLUMN].size for _ in range(BATCH))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function in a fresh process: a child's peak memory starts at its parent's, so this one stays small."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def measure(function: Callable[..., int], *arguments: Any) -> tuple[float, float, int, float]:
    """Wall and CPU seconds, tokens, and peak memory in MiB, in a fresh process, without imports."""
    return in_fresh_process(_measure, function, arguments)


def _measure(function: Callable[..., int], arguments: tuple[Any, ...]) -> tuple[float, float, int, float]:
    if "streaming" in function.__name__:
        import streaming  # noqa: F401
    wall, used = time.perf_counter(), time.process_time()
    tokens = function(*arguments)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    return wall, used, tokens, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def best(functions: list[Callable[..., int]], *arguments: Any, cold: bool = False) -> list[tuple[float, ...]]:
    """The fastest of ROUNDS rounds of each function; the functions take turns."""
    found: list[list[tuple[float, ...]]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for function, runs in zip(functions, found, strict=True):
            if cold:
                drop_pages(arguments[0])
            runs.append(measure(function, *arguments))
    return [min(runs) for runs in found]


def drop_pages(directory: Path) -> None:
    """Drop these files from the page cache."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100, metavar="MILLIONS")
    parser.add_argument("--sequence-length", type=int, default=2048, metavar="TOKENS")
    parser.add_argument("--directory", default=None, metavar="DIR", help="where to write the data (default: /tmp)")
    options = parser.parse_args()
    length = options.sequence_length
    rows = options.tokens * 1_000_000 // (length + 1)
    root = Path(tempfile.mkdtemp(prefix="mythos-reading-", dir=options.directory))
    try:
        print(f"{rows:,} rows of {length + 1} uint16, batches of {BATCH}, load {os.getloadavg()[0]:.1f}")
        in_fresh_process(write, root / "reading", rows, length, 25)
        results = best([read_memmap, read_ours, read_streaming], root / "reading", rows, length)
        for name, (wall, used, tokens, memory) in zip(("memmap", "ours", "StreamingDataset"), results, strict=True):
            print(
                f"  {name:<17} {tokens / wall / 1e6:7.0f}M tokens/s, {used / tokens * 1e9:6.2f} CPU s per billion, "
                f"{results[0][0] / wall * tokens / results[0][2]:6.1%} of memmap, peak {memory:.0f} MiB"
            )
        shutil.rmtree(root / "reading")
        for shards in (10, 1000):
            in_fresh_process(write, root / "start", rows, length, shards)
            found = len(list((root / "start" / "train").glob("*.mds")))
            for cold in (False, True):
                results = best([start_ours, start_streaming], root / "start", rows, length, cold=cold)
                parts = [
                    f"{name} {wall:.3f} s ({used:.3f} CPU)"
                    for name, (wall, used, *_) in zip(("ours", "StreamingDataset"), results, strict=True)
                ]
                print(f"  {found} shards, {'cold' if cold else 'warm'}: first batch after {', '.join(parts)}")
            shutil.rmtree(root / "start")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
