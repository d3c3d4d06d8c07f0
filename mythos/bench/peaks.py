"""The peaks of this machine: matrix products, copies, and collectives between the ranks.

All ranks measure at the same time, so that what they share (cores, memory, links) is shared as in training.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.hardware import WINDOW_S, WINDOWS, best_seconds, matmul_flops_per_second, seconds_of
from mythos.ranks import group

MIB = 2**20


@dataclass(frozen=True)
class Sizes:
    """What is measured on one type of device."""

    matrices: tuple[int, ...]
    """Rows and columns of square matrices."""
    copy_bytes: int
    """Larger than the caches."""
    message_bytes: tuple[int, ...]


SIZES = {
    "cpu": Sizes((256, 512, 1024, 2048), 128 * MIB, (2**12, 2**16, 2**20, 2**24)),
    "cuda": Sizes((1024, 2048, 4096, 8192, 16384), 1024 * MIB, (2**12, 2**20, 2**24, 2**28)),
}


@dataclass(frozen=True)
class MatmulRate:
    """Products of square matrices, on all ranks together."""

    dtype: str
    size: int
    flops_per_second: float


@dataclass(frozen=True)
class CopyRate:
    """Copies of large tensors, on all ranks together; a byte counts once, although it is read and written."""

    kind: str
    bytes: int
    bytes_per_second: float


@dataclass(frozen=True)
class CollectiveRate:
    """A collective over all ranks.

    ``bytes`` is the size of the whole tensor: what every rank has before an all-reduce or all-to-all, after an
    all-gather, before a reduce-scatter. ``bus_bytes_per_second`` is what a rank sends, as nccl-tests defines it: it
    compares with the speed of the link, whatever the collective and the number of ranks.
    """

    kind: str
    bytes: int
    seconds: float
    bus_bytes_per_second: float


@dataclass(frozen=True)
class Peaks:
    """All that was measured."""

    matmul: tuple[MatmulRate, ...]
    copies: tuple[CopyRate, ...]
    collectives: tuple[CollectiveRate, ...]
    """None for one rank."""

    def matmul_flops_per_second(self, dtype: torch.dtype) -> float:
        """The best of all sizes in this type, over all ranks."""
        return max(rate.flops_per_second for rate in self.matmul if rate.dtype == name_of(dtype))


def measure_peaks(device: torch.device, dtypes: Sequence[torch.dtype], sizes: Sizes) -> Peaks:
    """Measure everything. Collective."""
    matmul = tuple(_matmul(size, device, dtype) for dtype in dtypes for size in sizes.matrices)
    copies = tuple(_copies(sizes.copy_bytes, device))
    with warnings.catch_warnings():
        # The names of collectives that torch 2.11 has are deprecated in 2.14.
        warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
        collectives = tuple(_collectives(sizes.message_bytes, device)) if dist.get_world_size() > 1 else ()
    return Peaks(matmul, copies, collectives)


def name_of(dtype: torch.dtype) -> str:
    """fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def _matmul(size: int, device: torch.device, dtype: torch.dtype) -> MatmulRate:
    dist.barrier()
    return MatmulRate(name_of(dtype), size, _sum(matmul_flops_per_second(size, device, dtype), device))


def _copies(size: int, device: torch.device) -> Iterator[CopyRate]:
    here = torch.zeros(size, dtype=torch.uint8, device=device)
    yield _copy("on the device", here, torch.zeros_like(here), device)
    if device.type == "cuda":
        host = torch.zeros(size, dtype=torch.uint8).pin_memory()
        yield _copy("host to device", here, host, device)
        yield _copy("device to host", host, here, device)


def _copy(kind: str, to: Tensor, source: Tensor, device: torch.device) -> CopyRate:
    dist.barrier()
    seconds = best_seconds(lambda: to.copy_(source, non_blocking=True), device)
    return CopyRate(kind, source.numel(), _sum(source.numel() / seconds, device))


def _collectives(message_bytes: Sequence[int], device: torch.device) -> Iterator[CollectiveRate]:
    ranks = dist.get_world_size()
    for size in message_bytes:
        elements = max(1, size // 4 // ranks) * ranks
        whole, other = (torch.zeros(elements, device=device) for _ in range(2))
        part = torch.zeros(elements // ranks, device=device)
        # What a rank sends, in sizes of the tensor: of an all-reduce by rings or halving, (n - 1)/n twice.
        share = (ranks - 1) / ranks
        works: dict[str, tuple[Callable[[], object], float]] = {
            "all-reduce": (partial(dist.all_reduce, whole), 2 * share),
            "all-gather": (partial(dist.all_gather_into_tensor, whole, part), share),
            "reduce-scatter": (partial(dist.reduce_scatter_tensor, part, whole), share),
            "all-to-all": (partial(dist.all_to_all_single, other, whole), share),
        }
        for kind, (work, sent) in works.items():
            seconds = _collective_seconds(work, device)
            yield CollectiveRate(kind, 4 * elements, seconds, sent * 4 * elements / seconds)


def _collective_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call on the slowest rank. All ranks make the same number of calls."""
    seconds_of(work, 1, device)
    calls = max(1, round(WINDOW_S / _largest(seconds_of(work, 1, device), device)))
    return _largest(min(seconds_of(work, calls, device) for _ in range(WINDOWS)) / calls, device)


def _sum(own: float, device: torch.device) -> float:
    return float(_gathered(own, device).sum())


def _largest(own: float, device: torch.device) -> float:
    return float(_gathered(own, device).max())


def _gathered(own: float, device: torch.device) -> Tensor:
    return group.gather(torch.tensor([own], dtype=torch.float64, device=device))
