"""The peak that speed is compared with."""

import time

import torch
import torch.distributed as dist

from mythos.hardware import best_seconds, peak_of_all_ranks, seconds_of
from tests.spawn import RankPool

CPU = torch.device("cpu")


def peak(given: float | None) -> float:
    return peak_of_all_ranks(given if given is None else given * (1 + dist.get_rank()), CPU, torch.float32)


def test_the_peak_of_all_ranks_is_the_sum_of_theirs(two_ranks: RankPool) -> None:
    assert two_ranks.run(peak, 2e12) == [6e12, 6e12]


def test_a_peak_that_is_not_known_is_measured(two_ranks: RankPool) -> None:
    first, second = two_ranks.run(peak, None)
    assert first == second
    assert 1e8 < first < 1e16


def test_time_is_that_of_one_call() -> None:
    assert seconds_of(lambda: time.sleep(0.02), 3, CPU) >= 0.06
    calls: list[None] = []
    assert best_seconds(lambda: (calls.append(None), time.sleep(0.01)), CPU) >= 0.01
    assert len(calls) > 3
