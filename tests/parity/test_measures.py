"""The values whose mean is a metric: their spread is that of the metric."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mythos.eval.answers import Problems
from mythos.parity.measures import Arm
from mythos.parity.results import read_run
from mythos.parity.verdict import mean_of
from tests.parity.test_compare import write_two

TRAINED, LEVELS = 2, {1: 40, 2: 100, 3: 60}
"""Problems of each difficulty."""


@pytest.fixture
def arm(tmp_path: Path) -> Arm:
    """One dense run that solves all problems of difficulty 1, most of 2 and some of 3."""
    write_two(tmp_path, 0.1)
    difficulties_N = np.repeat(list(LEVELS), list(LEVELS.values()))
    chance_N = np.array([1.0, 0.8, 0.3])[difficulties_N - 1]
    solved_N = np.random.default_rng(1).random(len(chance_N)) < chance_N
    beyond_N = difficulties_N > TRAINED
    items = {"problems_difficulty": difficulties_N, "problems_beyond": beyond_N, "problems_solved": solved_N}
    return Arm("dense", (replace(read_run(tmp_path / "dense/seed-1"), items=items),))


@pytest.mark.parametrize(("metric", "levels"), [("accuracy", (1, 2)), ("accuracy_beyond", (3,))])
def test_an_accuracy_is_that_of_the_evaluation_and_its_interval_that_of_fixed_difficulties(
    metric: str, levels: tuple[int, ...], arm: Arm
) -> None:
    items = arm.runs[0].items
    solved_N, difficulties_N = items["problems_solved"], items["problems_difficulty"]
    expected = Problems([], difficulties_N, TRAINED).accuracies(solved_N)[metric]
    found = mean_of(arm, metric)
    assert found.estimate == pytest.approx(expected)
    shares = np.array([solved_N[difficulties_N == level].mean() for level in levels])
    error = np.sqrt(sum(p * (1 - p) / LEVELS[level] for p, level in zip(shares, levels, strict=True))) / len(levels)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.08)


def test_where_all_problems_are_solved_nothing_varies_and_no_accuracy_is_above_1(arm: Arm) -> None:
    run = arm.runs[0]

    def with_solved(*chances: float) -> Arm:
        of_runs = [
            np.random.default_rng(n).random(len(run.items["problems_beyond"])) < p for n, p in enumerate(chances)
        ]
        return Arm("dense", tuple(replace(run, items=run.items | {"problems_solved": each}) for each in of_runs))

    sure = mean_of(with_solved(1.0, 1.0), "accuracy")
    assert (sure.low, sure.high) == pytest.approx((1, 1))
    unsure = mean_of(with_solved(1.0, 0.5), "accuracy")
    assert (unsure.low, unsure.high) == (0.0, 1.0), "of two seeds hardly anything is known"
