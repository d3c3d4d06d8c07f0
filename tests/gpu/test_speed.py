"""The share of the measured peak that training reaches, before and after, in turn; kernels by time; recompilations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo

from mythos.bench.measure import measure
from mythos.bench.peaks import Sizes
from mythos.bench.report import joined
from mythos.config.load import load
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.hardware import BF16_PEAKS, best_seconds
from mythos.plan.flops import expected_steps, training_flops
from tests.gpu.training import train
from tests.spawn import ROOT

Record = Callable[[str, float, str], None]
KERNELS = 8


class Subject(NamedTuple):
    """A model that is measured as ``pretrain`` would train it, but for what the overrides say."""

    files: tuple[str, str]
    overrides: tuple[str, ...]
    least_share: float


ONE_MICRO_STEP = ("train.steps=8", "train.global_batch_tokens=16384", "train.micro_batch_sequences=8")
SMALL = ("train.steps=2", "train.global_batch_sequences=2", "train.micro_batch_sequences=2", "data.sequence_length=32")
SUBJECTS = {
    "cpu": {
        "experts": Subject(("tiny-looped-moe", "demo"), (*SMALL, "sample.tokens=0"), 0.0),
    },
    "cuda": {
        "looped": Subject(("looped-770m", "looped-770m"), ONE_MICRO_STEP, 0.45),
        "experts": Subject(
            ("looped-moe-770m", "pretrain"),
            (*ONE_MICRO_STEP, "parallel.zero_stage=2", "parallel.expert_parallel_size=1"),
            0.25,
        ),
    },
}
"""On a CPU the models are small and no share is asked for."""
BEFORE = dict.fromkeys(SUBJECTS, ("loop.recompute=true", "compile=off"))
AFTER = {
    "cpu": ("loop.recompute=false", "compile=off"),  # tests/model/test_compilation.py compiles for a CPU, for a minute
    "cuda": ("loop.recompute=false", "compile=blocks"),
}


def settings(subject: Subject, *overrides: str) -> Config:
    """The configuration of the subject on one rank; no data and no directory are used."""
    model, run = subject.files
    files = [ROOT / "configs" / "model" / f"{model}.yaml", ROOT / "configs" / "run" / f"{run}.yaml"]
    return load(files, [*subject.overrides, *overrides], 1)


class Result(NamedTuple):
    """Of the setting before and after."""

    shares: tuple[float, float]
    """Of the measured peak of matrix products, with attention counted over the whole sequence."""
    causal_share: float
    """After, with attention counted causally."""
    peak_flops_per_second: float
    memory_gib: tuple[float, float]
    copy_bytes_per_second: float


def measured(device: torch.device, name: str) -> Result:
    """Speeds before and after, A B A B."""
    subject = SUBJECTS[device.type][name]
    both = [settings(subject, *options[device.type]) for options in (BEFORE, AFTER)]
    sizes = Sizes((64,), 1 << 20, ()) if device.type == "cpu" else None
    found = measure(both, device, warmup=both[0].train.steps // 2, rounds=2, sizes=sizes)
    before, after = (joined([speeds[number] for speeds in found.rounds]) for number in (0, 1))
    length, steps = both[1].data.sequence_length, expected_steps(both[1].loop)
    full, causal = (training_flops(both[1].model, length, steps, causal=causal) for causal in (False, True))
    return Result(
        (before.share_of_peak, after.share_of_peak),
        after.share_of_peak * causal / full,
        after.peak_flops_per_second,
        (before.peak_memory_gib, after.peak_memory_gib),
        found.peaks.copies[0].bytes_per_second,
    )


@pytest.mark.gpu
def test_share_of_the_peak(device: torch.device, here: Callable[..., Any], record: Record) -> None:
    check_share("looped", device, here, record)


def test_share_of_the_peak_with_experts(device: torch.device, here: Callable[..., Any], record: Record) -> None:
    check_share("experts", device, here, record)


def check_share(name: str, device: torch.device, here: Callable[..., Any], record: Record) -> None:
    subject, result = SUBJECTS[device.type][name], here(measured, name)
    model, wanted = subject.files[0], f">= {subject.least_share:g}"
    record(f"{model}, before ({', '.join(BEFORE[device.type])})", result.shares[0], "printed")
    record(f"{model}, after ({', '.join(AFTER[device.type])})", result.shares[1], wanted)
    record(f"{model}, after, attention counted causally", result.causal_share, "printed")
    for when, memory in zip(("before", "after"), result.memory_gib, strict=True):
        record(f"{model}, peak memory {when}, GiB", memory, "printed")
    record("peak of matrix products, TFLOP/s", result.peak_flops_per_second / 1e12, "printed")
    record("copy on the device, GB/s", result.copy_bytes_per_second / 1e9, "printed")
    if device.type == "cuda" and (data_sheet := BF16_PEAKS.get(torch.cuda.get_device_name(device))):
        share = result.shares[1] * result.peak_flops_per_second / data_sheet
        record(f"{model}, after, share of the data sheet's peak", share, "printed")
    assert min(result.shares) > 0
    assert 0 < result.causal_share <= result.shares[1]
    assert result.shares[1] >= subject.least_share


def profiled(device: torch.device, name: str) -> tuple[int, list[tuple[str, float]]]:
    """Graphs that are compiled after two steps of warm-up, and the operations with the largest shares of the time."""
    config = settings(
        SUBJECTS[device.type][name], *AFTER[device.type], f"train.steps={2 if device.type == 'cpu' else 12}"
    )
    engine = TrainingEngine(config, device)
    train(engine, config, config.train.steps - 1)  # other depths, and other numbers of sequences that are due
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    activities = [getattr(torch.profiler.ProfilerActivity, "CUDA" if device.type == "cuda" else "CPU")]
    with torch.profiler.profile(activities=activities) as profile:
        train(engine, config, 1, config.train.steps - 1)
    attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, attribute) for event in profile.key_averages()}
    longest = sorted(times, key=times.__getitem__, reverse=True)[:KERNELS]
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    return compiled, [(key, times[key] / sum(times.values())) for key in longest]


@pytest.mark.gpu
def test_kernels_and_recompilations(here: Callable[..., Any], record: Record) -> None:
    check_kernels("looped", here, record)


def test_kernels_and_recompilations_with_experts(here: Callable[..., Any], record: Record) -> None:
    check_kernels("experts", here, record)


def check_kernels(name: str, here: Callable[..., Any], record: Record) -> None:
    compiled, longest = here(profiled, name)
    record(f"{name}: graphs compiled after warm-up", compiled, "0")
    for kernel, share in longest:
        record(f"{name}: share of `{kernel[:60]}`", share, "printed")
    assert compiled == 0
    assert longest[0][1] > 0


def grouped_products(device: torch.device) -> float:
    """FLOP/s in bf16 of the products of the flagship's experts, as AutoEP calls them, tokens evenly spread."""
    experts, tokens, width, hidden = {"cpu": (4, 64, 64, 48), "cuda": (64, 98_304, 1280, 608)}[device.type]
    x = torch.randn(tokens, width, device=device).bfloat16()
    weight = torch.randn(experts, hidden, width, device=device).bfloat16()
    ends = torch.arange(1, experts + 1, device=device, dtype=torch.int32) * (tokens // experts)
    seconds = best_seconds(lambda: torch._grouped_mm(x, weight.mT, offs=ends), device)
    return 2 * tokens * width * hidden / seconds


def test_grouped_products(here: Callable[..., Any], record: Record) -> None:
    found = here(grouped_products)
    record("gate and up of 64 experts, TFLOP/s", found / 1e12, "printed")
    assert found > 0
