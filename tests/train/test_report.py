"""The metrics that a step reports."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mythos.loss import Mean
from mythos.plan.flops import LoopSteps, executed_steps, training_flops
from mythos.ranks.preemption import StopRequest
from mythos.train.report import depth_metrics, expert_metrics, flops_metrics
from mythos.train.step import StepResult, _join, _peak_memory_gib, exchange
from tests.spawn import RankPool
from tests.tiny import tiny_config


def test_expert_metrics() -> None:
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [0.0, 0.0, 12.0, 4.0]])
    assert expert_metrics(load) == {"moe/load_max_over_mean": 3.0, "moe/experts_unused": 2.0}


def test_depth_metrics() -> None:
    assert depth_metrics(np.array([1, 3, 8]), 4) == {"depth/mean": 4.0, "depth/with_grad": pytest.approx(8 / 3)}


def test_flops_metrics_count_the_executed_depths() -> None:
    batch = {"train__global_batch_sequences": 3, "train__micro_batch_sequences": 3}
    config = tiny_config("looped", Path("data"), Path("run"), **batch)
    steps = executed_steps(np.array([1, 3, 8]), config.loop)
    assert steps == LoopSteps(without_grad=(1 + 6) / 3, with_grad=5 / 3), "two steps carry gradient"
    flops = 3 * 15 * training_flops(config.model, 15, steps)
    assert flops_metrics(config, np.array([1, 3, 8]), 0.5, 1e9) == {
        "perf/model_flops_per_second": pytest.approx(flops / 0.5),
        "perf/mfu": pytest.approx(flops / 0.5 / 1e9),
    }


def test_diagnostics_are_averaged_over_micro_batches() -> None:
    parts = [
        {"loop/state_norm": Mean(torch.tensor(2.0)), "a": Mean(6, 3)},
        {"loop/state_norm": Mean(4.0), "a": Mean(0, 0)},
    ]
    assert _join(parts) == {"loop/state_norm": Mean(6.0, 2.0), "a": Mean(6.0, 3)}
    assert _join([{}]) == {}


def numbers_of_a_rank(changed: dict[int, Mean]) -> tuple[dict[str, float], int | None]:
    """What the exchange makes of numbers that each rank has measured over a part of its own."""
    measured = {"train/loss": Mean(2.0 + dist.get_rank()), "moe/choice_changed": changed[dist.get_rank()]}
    result = StepResult(measured, None, True, 1.0, text_tokens=100 + dist.get_rank())
    nothing: Any = SimpleNamespace(failed=lambda: False, waited_seconds=0.0, pending=False)
    votes = exchange(result, StopRequest(), nothing, nothing, torch.device("cpu"))
    return votes.measured, votes.text_tokens


def test_a_metric_counts_where_it_was_measured_and_is_absent_where_nothing_was(two_ranks: RankPool) -> None:
    assert two_ranks.run(numbers_of_a_rank, {0: Mean(0.0, 0), 1: Mean(3.0, 12)}) == 2 * [
        ({"train/loss": 2.5, "moe/choice_changed": 0.25}, 201)
    ]
    assert two_ranks.run(numbers_of_a_rank, {0: Mean(0.0, 0), 1: Mean(0.0, 0)}) == 2 * [({"train/loss": 2.5}, 201)]


def test_peak_memory_is_that_of_the_process() -> None:
    assert _peak_memory_gib(torch.device("cpu")) > 0.05
