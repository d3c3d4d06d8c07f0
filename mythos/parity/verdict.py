"""What an experiment's criterion says of its results."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mythos.parity import statistics
from mythos.parity.experiment import Criterion
from mythos.parity.measures import OF_PROBLEMS, Arm, check_same_items, higher_is_better
from mythos.parity.statistics import Interval

Answer = Literal["matches", "does not match", "not decided", "no verdict: one seed", "no verdict: arms are missing"]


@dataclass(frozen=True)
class Decision:
    """The answer, and what it follows from; None where arms are missing. Differences are in the metric's unit.

    ``missed`` = looped - large - margin (small - large), with the sign that makes a larger value the worse one: the
    looped arm matches if all of its interval is below 0, and does not if all of it is above.
    """

    answer: Answer
    missed: Interval | None = None
    difference: Interval | None = None
    """looped - large."""
    from_small: Interval | None = None
    """looped - small."""
    gap: Interval | None = None
    """small - large."""
    share: Interval | None = None
    """Of the gap, what the looped arm closes; 1: as good as the large one."""


def decide(criterion: Criterion, arms: Mapping[str, Arm]) -> Decision:
    """Apply the criterion to the finished arms.

    Raises:
        UserError: the arms were not evaluated on the same documents, or not by the criterion's metric.
    """
    names = (criterion.small, criterion.looped, criterion.large)
    if any(name not in arms for name in names):
        return Decision("no verdict: arms are missing")
    chosen = [arms[name] for name in names]
    check_same_items(chosen)
    small, looped, large = (arm.values(criterion.metric) for arm in chosen)
    sign = -1.0 if higher_is_better(criterion.metric) else 1.0
    factors = (-sign * criterion.margin, sign, sign * (criterion.margin - 1))
    missed = statistics.combination([small, looped, large], factors)
    return Decision(
        _answer(missed, min(len(arm.runs) for arm in chosen)),
        missed,
        statistics.difference(looped, large),
        statistics.difference(looped, small),
        statistics.difference(small, large),
        statistics.gap_share(small, looped, large),
    )


def mean_of(arm: Arm, metric: str, depth: int | None = None) -> Interval:
    """The mean of a metric with its interval, at the arm's mean depth or another one; an accuracy lies in 0 ... 1."""
    found = statistics.mean(arm.values(metric, depth))
    if metric not in OF_PROBLEMS:
        return found
    return Interval(found.estimate, max(0.0, found.low), min(1.0, found.high))


def compared(arm: Arm, other: Arm, metric: str) -> tuple[Interval, statistics.Verdict]:
    """mean(arm) - mean(other) of a metric, and whether the two are told apart."""
    one, two = arm.values(metric), other.values(metric)
    found = statistics.difference(one, two)
    return found, found.verdict(min(len(one), len(two)))


def _answer(missed: Interval, seeds: int) -> Answer:
    match missed.verdict(seeds):
        case "one seed":
            return "no verdict: one seed"
        case "lower":
            return "matches"
        case "higher":
            return "does not match"
    return "not decided"


def spread(values_SN: np.ndarray) -> float:
    """The standard deviation of an arm's mean over its seeds; NaN for one seed."""
    return float(values_SN.mean(axis=1).std(ddof=1)) if len(values_SN) > 1 else float("nan")
