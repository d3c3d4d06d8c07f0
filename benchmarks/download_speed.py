"""obstore and the download module of mosaicml-streaming on the same local S3 server.

For each, in a fresh process: seconds from the start of the import to the first small object, the throughput of an
object of 32 MiB (the best of several), and the peak memory of the process.

    python -m benchmarks.download_speed
"""

import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.data.object_store import object_store

OBJECT_MIB = 32
ROUNDS = 8
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "no_proxy": "127.0.0.1",
}


def with_obstore() -> Callable[[str, Path], None]:
    """Download as Mythos does."""
    from mythos.data import remote

    return remote.fetch


def with_streaming() -> Callable[[str, Path], None]:
    """Download as the readers of mosaicml-streaming do."""
    from streaming.base.storage.download import S3Downloader

    downloader = S3Downloader()
    return lambda origin, target: downloader.download(origin, str(target), 60)


def measure(prepare: Callable[[], Callable[[str, Path], None]], directory: Path) -> tuple[float, float, int]:
    """Seconds to the first object, MiB/s of the large one, and peak memory in MiB."""
    start = time.perf_counter()
    fetch = prepare()
    fetch("s3://bucket/small", directory / f"{prepare.__name__}-small")
    first_s = time.perf_counter() - start
    best_s = float("inf")
    for number in range(ROUNDS):
        start = time.perf_counter()
        fetch("s3://bucket/large", directory / f"{prepare.__name__}-{number}")
        best_s = min(best_s, time.perf_counter() - start)
    return first_s, OBJECT_MIB / best_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Print the figures."""
    os.environ.update(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as name, object_store(Path(name)) as endpoint:
        os.environ["S3_ENDPOINT_URL"] = endpoint
        (Path(name) / "small").write_bytes(b"small")
        (Path(name) / "large").write_bytes(os.urandom(OBJECT_MIB << 20))
        for prepare in (with_obstore, with_streaming):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                first_s, throughput, memory = pool.apply(measure, (prepare, Path(name)))
            print(
                f"{prepare.__name__}: first object after {first_s:.1f} s, {throughput:.0f} MiB/s, {memory} MiB, "
                f"load {os.getloadavg()[0]:.1f}"
            )


if __name__ == "__main__":
    main()
