"""What was measured, as rows of tables and as JSON."""

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

import mythos
from mythos.bench.measure import Measurement
from mythos.bench.peaks import Peaks, name_of
from mythos.bench.speed import Speed
from mythos.bench.timeline import Part
from mythos.config.load import to_dict
from mythos.config.schema import Config

BINARY = ("B", "KiB", "MiB", "GiB")


def joined(speeds: Sequence[Speed]) -> Speed:
    """The rounds of one setting as one."""
    part_seconds = {part: sum(speed.part_seconds[part] for speed in speeds) / len(speeds) for part in Part}
    return replace(
        speeds[0],
        step_seconds=tuple(seconds for speed in speeds for seconds in speed.step_seconds),
        processor_seconds=sum(speed.processor_seconds for speed in speeds) / len(speeds),
        part_seconds=part_seconds,
        peak_memory_gib=max(speed.peak_memory_gib for speed in speeds),
    )


def peak_rows(peaks: Peaks) -> list[tuple[str, str, str, str]]:
    """What was done, with what, its rate and its time."""
    rows = [
        ("matrix product", f"{rate.dtype}, {rate.size} x {rate.size}", f"{scaled(rate.flops_per_second)}FLOP/s", "")
        for rate in peaks.matmul
    ]
    rows += [
        ("copy", f"{copy.kind}, {binary(copy.bytes)}", f"{scaled(copy.bytes_per_second)}B/s", "")
        for copy in peaks.copies
    ]
    rows += [
        (rate.kind, binary(rate.bytes), f"{scaled(rate.bus_bytes_per_second)}B/s", f"{scaled(rate.seconds)}s")
        for rate in peaks.collectives
    ]
    return rows


def part_rows(speed: Speed) -> list[tuple[str, str, str, str]]:
    """Each part of a step: its name, time, share of the step, and its model FLOP/s as a share of the peak."""
    total = sum(speed.part_seconds.values())
    rows = []
    for part, seconds in speed.part_seconds.items():
        share = speed.part_share_of_peak(part)
        of_peak = "" if share is None else f"{share:.1%} of the peak"
        rows.append((part.value, f"{1000 * seconds:,.2f} ms", f"{seconds / total:.1%} of the step", of_peak))
    return rows


def summary_rows(speed: Speed) -> list[tuple[str, str]]:
    """The figures of a setting, by name."""
    mean = sum(speed.step_seconds) / len(speed.step_seconds)
    fastest, slowest = min(speed.step_seconds), max(speed.step_seconds)
    return [
        ("step", f"{1000 * mean:,.1f} ms ({1000 * fastest:,.1f} to {1000 * slowest:,.1f})"),
        ("processor time", f"{1000 * speed.processor_seconds:,.1f} ms a rank and step"),
        ("tokens", f"{speed.tokens_per_second:,.0f} tokens/s"),
        ("model FLOPs", f"{scaled(speed.flops.total)}FLOP a token, {scaled(speed.model_flops_per_second)}FLOP/s"),
        ("share of the peak", f"{speed.share_of_peak:.1%} of {scaled(speed.peak_flops_per_second)}FLOP/s"),
        ("peak memory", f"{speed.peak_memory_gib:,.2f} GiB a rank"),
    ]


def comparison_rows(measurement: Measurement) -> list[tuple[str, str]]:
    """Tokens/s of both settings in every round, and their ratio with its spread."""
    rows = [
        (f"round {number}", f"A {first.tokens_per_second:,.0f} tokens/s, B {second.tokens_per_second:,.0f} tokens/s")
        for number, (first, second) in enumerate(measurement.rounds, 1)
    ]
    ratios = ratios_of(measurement)
    return [*rows, ("B over A", f"{geometric_mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")]


def ratios_of(measurement: Measurement) -> list[float]:
    """Tokens/s of the second setting over that of the first, round by round."""
    return [second.tokens_per_second / first.tokens_per_second for first, second in measurement.rounds]


def speed_json(speed: Speed) -> dict[str, Any]:
    """The figures of a setting."""
    return {
        "tokens_per_second": speed.tokens_per_second,
        "model_flops_per_second": speed.model_flops_per_second,
        "matmul_peak_flops_per_second": speed.peak_flops_per_second,
        "share_of_peak": speed.share_of_peak,
        "training_flops_per_token": speed.flops.total,
        "tokens_per_step": speed.tokens,
        "step_seconds": speed.step_seconds,
        "processor_seconds": speed.processor_seconds,
        "peak_memory_gib": speed.peak_memory_gib,
        "parts": {
            part.value: {"seconds": seconds, "share_of_peak": speed.part_share_of_peak(part)}
            for part, seconds in speed.part_seconds.items()
        },
    }


def to_json(measurement: Measurement, device: torch.device, settings: Sequence[Config]) -> dict[str, Any]:
    """Where it was measured, the machine's peaks and, of the first setting, the figures; then the comparison."""
    peaks, dtype = measurement.peaks, measurement.peak_dtype
    figures: dict[str, Any] = {
        "version": mythos.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "ranks": dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "peaks": asdict(peaks),
        "matmul_peak_dtype": name_of(dtype),
        "matmul_peak_flops_per_second": peaks.matmul_flops_per_second(dtype),
    }
    if measurement.rounds:
        figures |= speed_json(joined([speeds[0] for speeds in measurement.rounds]))
        figures["configuration"] = to_dict(settings[0])
    if len(settings) > 1:
        ratios = ratios_of(measurement)
        figures["comparison"] = {
            "ratio": {"mean": geometric_mean(ratios), "lowest": min(ratios), "highest": max(ratios)},
            "rounds": [[speed_json(speed) for speed in speeds] for speeds in measurement.rounds],
            "configuration": to_dict(settings[1]),
        }
    return figures


def geometric_mean(ratios: Sequence[float]) -> float:
    """Of ratios: that of the inverse ratios is its inverse."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def scaled(value: float) -> str:
    """A number with three digits and the prefix of its unit: 28.6 G, 85.0 u."""
    prefixes = {1e15: "P", 1e12: "T", 1e9: "G", 1e6: "M", 1e3: "k", 1.0: "", 1e-3: "m", 1e-6: "u", 1e-9: "n"}
    for scale, prefix in prefixes.items():
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "


def binary(size: int) -> str:
    """A number of bytes: 4 KiB, 16 MiB."""
    exponent = min(len(BINARY) - 1, max(0, (size.bit_length() - 1) // 10))
    return f"{size / 1024**exponent:.3g} {BINARY[exponent]}"
