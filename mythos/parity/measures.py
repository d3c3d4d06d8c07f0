"""What arms are compared by: a value of each document (or problem) whose mean is the metric of `mythos eval`.

loss             nats of the document / mean tokens of a document
bits_per_byte    nats / ln 2 / mean bytes of a document
accuracy         its mean over the difficulties of training, + (1 if the problem is solved, else 0, - the share of its
                 difficulty) * problems / (difficulties * problems of that difficulty): their numbers are fixed, so they
                 add nothing to the spread
validation_loss  the last validation during training, one value for each run
any other        the metric itself, one value for each run
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mythos.errors import UserError
from mythos.parity.results import RunResult

OF_TEXT = ("loss", "bits_per_byte")
OF_PROBLEMS = ("accuracy", "accuracy_beyond")
LOWER_IS_BETTER = (*OF_TEXT, "perplexity", "validation_loss")


@dataclass(frozen=True)
class Arm:
    """The finished runs of one configuration, told apart by their seeds."""

    name: str
    runs: tuple[RunResult, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """In the order of the runs."""
        return tuple(run.config.seed for run in self.runs)

    @property
    def depth(self) -> int | None:
        """The mean depth of training; None for a dense model."""
        return self.runs[0].depth

    @property
    def measured_depths(self) -> list[int]:
        """The depths at which all runs were evaluated; none of a dense model."""
        if self.depth is None:
            return []
        measured = (set(run.evaluation.get("eval", {}).get("depths") or ()) for run in self.runs)
        return sorted(set.intersection(*measured))

    def values(self, metric: str, depth: int | None = None) -> np.ndarray:
        """The values, (seeds, documents), whose mean is the metric at a depth (the mean depth of training by default).

        Raises:
            UserError: a run was not evaluated so, or its evaluation is of other documents than that of another run.
        """
        at = self.depth if depth is None else depth
        return np.stack([_values(run, metric, at) for run in self.runs])

    def mean_metric(self, name: str, depth: int | None = None) -> float:
        """The mean over the seeds of a metric of `mythos eval`; NaN if it was not measured."""
        at = self.depth if depth is None else depth
        found = [value for run in self.runs if (value := run.metric(name, at)) is not None]
        return float(np.mean(found)) if found else math.nan


def higher_is_better(metric: str) -> bool:
    """Whether a larger value is the better one: of accuracies and scores of tasks."""
    return metric not in LOWER_IS_BETTER


def check_same_items(arms: Sequence[Arm]) -> None:
    """Check that all runs were evaluated on the same documents. Raises UserError."""
    first: RunResult | None = None
    for run in (run for arm in arms for run in arm.runs):
        first = first or run
        name = "documents" if "documents" in first.items else "problems_difficulty"
        own, others = run.items.get(name), first.items.get(name)
        data = [each.evaluation.get("data") for each in (run, first)]
        if own is None or others is None or not np.array_equal(own, others) or data[0] != data[1]:
            raise UserError(
                f"{run.directory} and {first.directory} were evaluated on other documents: evaluate both with the same "
                "data and the same --documents"
            )


def _values(run: RunResult, metric: str, depth: int | None) -> np.ndarray:
    if metric in OF_PROBLEMS:
        return _solved(run, metric, depth)
    if metric == "validation_loss" and depth == run.depth and run.curve.losses.size:
        return run.curve.losses[-1:]
    if metric in OF_TEXT:
        nats_N = run.item("documents_nats", depth)
        size_N = run.items.get("documents_tokens" if metric == "loss" else "documents_bytes")
        if nats_N is None or size_N is None:
            raise _not_measured(run, metric, depth)
        nats: np.ndarray = nats_N / size_N.mean() / (1.0 if metric == "loss" else math.log(2))
        return nats
    value = run.metric(metric, depth)
    if value is None:
        raise _not_measured(run, metric, depth)
    return np.array([value])


def _solved(run: RunResult, metric: str, depth: int | None) -> np.ndarray:
    solved_N, difficulty_N = run.item("problems_solved", depth), run.items.get("problems_difficulty")
    if solved_N is None or difficulty_N is None:
        raise _not_measured(run, metric, depth)
    counted_N = run.items["problems_beyond"] == (metric == "accuracy_beyond")
    levels, sizes = np.unique(difficulty_N[counted_N], return_counts=True)
    if not len(levels):
        raise _not_measured(run, metric, depth)
    shares = [solved_N[difficulty_N == level].mean() for level in levels]
    values_N = np.full(len(solved_N), np.mean(shares))
    for level, size, share in zip(levels, sizes, shares, strict=True):
        own_N = difficulty_N == level
        values_N[own_N] += (solved_N[own_N] - share) * len(solved_N) / (len(levels) * size)
    return values_N


def _not_measured(run: RunResult, metric: str, depth: int | None) -> UserError:
    at = "" if depth is None else f" at depth {depth}"
    return UserError(f"{run.directory}: {metric}{at} was not measured there: evaluate it again with `mythos eval`")
