"""How fast a device is: the peak that ``perf/mfu`` is a share of, measured rates, and how to measure time on it."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from mythos.ranks import group
from mythos.run.console import log

BF16_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA B200": 2250e12,
    "AMD Instinct MI300X": 1307.4e12,
}
"""FLOP/s of bf16 matrix products without sparsity, from the vendors' data sheets, by the name that torch reports."""
WINDOWS, WINDOW_S = 3, 0.05
PEAK_SIZES = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices with which an unknown peak is measured."""


def peak_of_all_ranks(given: float | None, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products that all ranks' devices can do together. Collective.

    Args:
        given: the peak of one rank's device, if it need not be looked up or measured.
    """
    if given is not None:
        own, source = given, "perf.peak_flops_per_second"
    elif dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_name(device) in BF16_PEAKS:
        name = torch.cuda.get_device_name(device)
        own, source = BF16_PEAKS[name], f"data sheet of {name}"
    else:
        dist.barrier()  # ranks that share the cores of a machine measure at the same time
        own, source = matmul_flops_per_second(PEAK_SIZES[device.type], device, dtype), "measured"
    peak = float(group.gather(torch.tensor([own], dtype=torch.float64, device=device)).sum())
    log.info(f"peak for perf/mfu: {peak / 1e12:.4g} TFLOP/s over all ranks ({source})")
    return peak


def matmul_flops_per_second(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products of square matrices."""
    # Random numbers: a GPU clocks higher when the bits of its operands do not change.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    result = torch.empty_like(left)
    with torch.no_grad():
        return 2 * size**3 / best_seconds(lambda: torch.mm(left, right, out=result), device)


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call of ``work``: the best of WINDOWS means over at least WINDOW_S, after a call to warm up.

    A window is longer than the time that a core gives to a process, so that processes which share cores do not each
    measure the whole core.
    """
    seconds_of(work, 1, device)
    calls = max(1, round(WINDOW_S / seconds_of(work, 1, device)))
    return min(seconds_of(work, calls, device) for _ in range(WINDOWS)) / calls


def seconds_of(work: Callable[[], object], calls: int, device: torch.device) -> float:
    """Seconds until the device has done the work of this many calls."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.perf_counter()
    for _ in range(calls):
        work()
    return time.perf_counter() - begun
