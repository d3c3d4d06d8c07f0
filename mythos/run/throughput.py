"""Time and memory of a training step."""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class StepClock:
    """Wall time of one optimizer step, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._start = time.perf_counter()
        self.data_wait_seconds = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.data_wait_seconds += time.perf_counter() - start

    def seconds(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self._start


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory of this rank so far: allocated on its GPU, or resident in RAM on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
