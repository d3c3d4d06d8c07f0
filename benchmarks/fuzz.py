"""Damaged files for every reader: `python -m benchmarks.fuzz --minutes 10 --seed 1`.

Each file is read by what reads it in use (see tests/fuzz/targets.py). Anything but a message of one line ends the run
with the file's content, as does a read of more than 5 s, or memory that grows by more than 1 GiB.
"""

import argparse
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.targets import Target, damaged, targets, try_one

LONGEST_READ_S = 5
GROWTH_KIB = 1 << 20
EXAMPLES = 200
"""Of each file in a round."""


def main() -> int:
    """Fuzz all readers in turn until the time is over, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGALRM, _too_slow)
    until, number = time.monotonic() + 60 * options.minutes, options.seed
    read: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as place:
        found = targets(Path(place))
        before_kib = _memory_kib()
        while time.monotonic() < until:
            for name, target in found.items():
                _fuzz(name, target, number, read, refused)
                assert _memory_kib() - before_kib < GROWTH_KIB, f"{name}: memory grew to {_memory_kib()} KiB"
            number += 1
    for name, count in read.items():
        print(f"{name:60} {count:8,} read, {refused[name]:8,} refused")
    print(f"{read.total():,} files, {refused.total():,} refused, memory {(_memory_kib() - before_kib) / 1024:+.0f} MiB")
    return 0


def _fuzz(name: str, target: Target, number: int, read: Counter[str], refused: Counter[str]) -> None:
    @seed(number)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(target.content))
    def run(content: bytes) -> None:
        signal.alarm(LONGEST_READ_S)
        try:
            refused[name] += try_one(target, content)
        finally:
            signal.alarm(0)
        read[name] += 1

    run()


def _too_slow(number: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"a read took more than {LONGEST_READ_S} s")


def _memory_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
