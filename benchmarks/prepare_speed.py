"""The speed of `mythos data prepare`, compared with the `tokenizers` library alone on the same text in the same run.

    python -m benchmarks.prepare_speed TEXT.parquet ... --tokenizer tokenizer.json

For 1 and 2 processes, and 2 MPI ranks: MB/s of the complete command (start, reading, packing, hashing, writing), MB/s
of `tokenizers` with as many processes of one thread each on text that is already in memory, their ratio, and the peak
memory of all processes of the command together (PSS, which counts shared memory once). On a busy machine, compare the
CPU seconds of both.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as parquet

BATCH_CHARACTERS = 1 << 20


def encode_alone(
    sources: list[Path], column: str, tokenizer: Path, start: Barrier, share: tuple[int, int], cpu_s: Any
) -> None:
    """One process: load its share of the batches into memory, then encode at the same time as the others."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    batches: list[list[str]] = [[]]
    characters = 0
    for source in sources:
        for text in filter(None, parquet.read_table(source, columns=[column]).column(0).to_pylist()):
            batches[-1].append(text)
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                batches.append([])
                characters = 0
    number, processes = share
    own = batches[number::processes]
    start.wait()
    start.wait()  # the parent has read the clocks
    before = time.process_time()
    for batch in own:
        encoder.encode_batch_fast(batch, add_special_tokens=False)
    cpu_s[number] = time.process_time() - before
    start.wait()


def measure_alone(sources: list[Path], column: str, tokenizer: Path, processes: int) -> tuple[float, float]:
    """Wall seconds and CPU seconds of encoding all text."""
    context = get_context("spawn")
    start = context.Barrier(processes + 1)
    cpu_s = context.Array("d", processes)
    workers = [
        context.Process(target=encode_alone, args=(sources, column, tokenizer, start, (number, processes), cpu_s))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    start.wait()
    began = time.monotonic()
    start.wait()
    start.wait()
    elapsed_s = time.monotonic() - began
    for worker in workers:
        worker.join()
    return elapsed_s, sum(cpu_s[:])


def measure_command(command: list[str]) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and peak memory in MB of a command and all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak))
    watcher.start()
    if process.wait():
        raise SystemExit(f"failed: {' '.join(command)}")
    elapsed_s = time.monotonic() - began
    watcher.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return elapsed_s, cpu_s, peak[0] / 1e6


def _watch(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    while process.poll() is None:
        total = 0
        try:
            for member in (root := psutil.Process(process.pid), *root.children(recursive=True)):
                total += member.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
        peak[0] = max(peak[0], total)
        time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--column", default="text")
    parser.add_argument("--packing", default="best_fit")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    texts = (parquet.read_table(source, columns=[arguments.column]).column(0) for source in arguments.sources)
    megabytes = sum(len(text.encode()) for column in texts for text in column.to_pylist() if text) / 1e6
    print(f"{megabytes:.1f} MB of text, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
    mythos = [sys.executable, "-m", "launch.cli", "data", "prepare", *map(str, arguments.sources)]
    mythos += ["--tokenizer", str(arguments.tokenizer), "--column", arguments.column, "--packing", arguments.packing]
    mpiexec = str(Path(sys.executable).parent / "mpiexec")
    for _ in range(arguments.rounds):
        for name, processes, before, after in [
            ("1 process", 1, [], ["--processes", "1"]),
            ("2 processes", 2, [], ["--processes", "2"]),
            ("2 MPI ranks", 2, [mpiexec, "-n", "2"], []),
        ]:
            alone_s, alone_cpu_s = measure_alone(arguments.sources, arguments.column, arguments.tokenizer, processes)
            directory = Path(tempfile.mkdtemp(prefix="prepare-speed-"))
            try:
                command = [*before, *mythos, "--output", str(directory / "data"), *after]
                elapsed_s, cpu_s, peak_mb = measure_command(command)
            finally:
                shutil.rmtree(directory)
            print(
                f"{name}: {megabytes / elapsed_s:.2f} MB/s, tokenizers alone {megabytes / alone_s:.2f} MB/s, ratio "
                f"{alone_s / elapsed_s:.2f}; CPU {cpu_s:.1f} s, alone {alone_cpu_s:.1f} s, ratio "
                f"{alone_cpu_s / cpu_s:.2f}; peak memory {peak_mb:.0f} MB; load {os.getloadavg()[0]:.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
