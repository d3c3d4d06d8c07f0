"""The difference between groups of runs at equal tokens, equal training FLOPs and equal time of the devices.

Two groups are compared at the largest budget that all of their runs have reached. If each of these runs has an
evaluation (`mythos eval`) of a checkpoint within ``NEAR`` of that budget, with the same settings, its documents are
compared: paired if they are the same, else (other tokenizers, other packing) by bits per byte alone, each group with
documents of its own. Otherwise the losses of the validations during training are compared, which have one value for
each run, interpolated linearly over the logarithm of the budget; then the interval is over seeds alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

from mythos.errors import UserError
from mythos.parity import statistics
from mythos.parity.groups import Found, Group, Signature, differing_rows, preference, signature
from mythos.parity.measures import OF_PROBLEMS, Arm
from mythos.parity.results import RunResult
from mythos.parity.statistics import Interval
from mythos.parity.tables import PREFERRED, judgement

Axis = Literal["tokens", "flops", "hours"]
AXES: dict[Axis, str] = {"tokens": "tokens", "flops": "training FLOPs", "hours": "device hours"}
OF_ROWS, PER_TOKEN = "rows_", ("loss", "perplexity")
"""How metrics begin or end that another tokenizer or packing changes."""
NEAR = 0.02
"""Largest relative distance of an evaluated checkpoint from a budget."""


@dataclass(frozen=True)
class Difference:
    """A group against the reference at an equal budget; without ``interval`` they could not be compared."""

    group: str
    reference: str
    axis: Axis
    budget: float
    shares: tuple[float, float]
    """How much of their training the two groups, as the mean of their runs, had behind them at the budget."""
    metric: str
    measured_on: str
    interval: Interval | None = None
    judgement: str = ""
    """Better, worse, not distinguished, or why there is no claim."""


def differences(groups: Sequence[Group], reference: Group, metric: str | None = None) -> list[Difference]:
    """Every other group against the reference, at equal tokens, FLOPs and time.

    Args:
        metric: of ``mythos.parity.measures``; by default accuracy on synthetic tasks, else bits per byte, else the loss
            of documents.
    """
    others = [group for group in groups if group.name != reference.name]
    return [difference(group, reference, axis, metric) for group in others for axis in AXES]


def difference(group: Group, reference: Group, axis: Axis, metric: str | None = None) -> Difference:
    """One group against another at the largest budget that all of their runs have reached."""
    both = (group, reference)
    ends = [np.array([getattr(found.run.curve, axis)[-1] for found in each.runs]) for each in both]
    budget = float(min(each.min() for each in ends))
    one, two = (float(np.mean(budget * _share(each) / end)) for each, end in zip(both, ends, strict=True))
    place = (group.name, reference.name, axis, budget, (one, two))
    if not budget > 0:
        return Difference(*place, "-", "-", judgement=f"{AXES[axis]} were not measured")
    evaluated = _evaluated(both, axis, budget)
    try:
        if evaluated is not None:
            return Difference(*place, *_of_documents(*evaluated, metric))
        return Difference(*place, *_of_validations(both, axis, budget, metric))
    except UserError as error:
        return Difference(*place, metric or "-", "-", judgement=str(error))


def find_group(groups: Sequence[Group], name: str | None) -> Group:
    """The group of this name, the first one by default. Raises UserError if there is none."""
    if name is None:
        return groups[0]
    for group in groups:
        if group.name == name:
            return group
    raise UserError(f"--reference {name}: no such group: give one of {', '.join(group.name for group in groups)}")


def _share(group: Group) -> np.ndarray:
    """Of each run, which share of its planned training its last validation is at."""
    steps = [found.run.config.train.steps for found in group.runs]
    return np.array([found.run.points[-1].updates for found in group.runs]) / steps


def _evaluated(both: Sequence[Group], axis: Axis, budget: float) -> tuple[Arm, Arm] | None:
    """The two groups with evaluations near the budget that were made alike, on the same documents if there are such."""
    near = [[_near(found, axis, budget) for found in group.runs] for group in both]
    own = [[key for key in choices[0] if all(key in choice for choice in choices)] for choices in near]
    alike = [keys for keys in product(*own) if keys[0].settings == keys[1].settings]
    if not alike:
        return None

    def rank(keys: tuple[Signature, ...]) -> tuple[Any, ...]:
        of_each = (preference(key, choices[0][key]) for key, choices in zip(keys, near, strict=True))
        return keys[0].ordinary, keys[0] == keys[1], *of_each

    best = max(alike, key=rank)
    return tuple(  # type: ignore[return-value]
        Arm(group.name, tuple(choice[key] for choice in choices))
        for group, key, choices in zip(both, best, near, strict=True)
    )


def _near(found: Found, axis: Axis, budget: float) -> dict[Signature, RunResult]:
    """The evaluations of a run near a budget, the nearest of each signature."""
    steps = [point.step for point in found.run.points]
    spent = [getattr(point, axis) for point in found.run.points]

    def distance(each: RunResult) -> float:
        # What a checkpoint after the last validation has cost is not known, so it is at no budget.
        return abs(float(np.interp(each.evaluation["step"], steps, spent, left=np.inf, right=np.inf)) / budget - 1)

    nearest = sorted(found.evaluations, key=distance, reverse=True)
    return {signature(each): each for each in nearest if distance(each) <= NEAR}


def _of_documents(arm: Arm, other: Arm, metric: str | None) -> tuple[str, str, Interval, str]:
    paired = signature(arm.runs[0]) == signature(other.runs[0])
    name = metric or _first_measured((arm, other), paired)
    if not paired and (name.startswith(OF_ROWS) or name.endswith(PER_TOKEN)):
        raise UserError(f"{name} depends on tokenizer and packing, which differ: compare bits_per_byte")
    one, two = arm.values(name), other.values(name)
    of_runs = one.shape[1] == two.shape[1] == 1
    found = statistics.difference(one, two, paired=paired or of_runs)
    items = "problems" if name in OF_PROBLEMS else "documents"
    counts = f"{one.shape[1]}" if paired else f"{one.shape[1]} and {two.shape[1]} other"
    measured_on = "runs" if of_runs else f"{counts} {items}"
    return name, measured_on, found, judgement(found.verdict(min(len(one), len(two))), name)


def _first_measured(arms: Sequence[Arm], paired: bool) -> str:
    names = [name for name in PREFERRED[:-1] if paired or name != "loss"]
    for name in names:
        try:
            if all(np.isfinite(arm.values(name)).all() for arm in arms):
                return name
        except UserError:
            continue
    raise UserError(f"the evaluations have no {' and no '.join(names)} in common: evaluate with the same --documents")


def _of_validations(
    both: Sequence[Group], axis: Axis, budget: float, metric: str | None
) -> tuple[str, str, Interval, str]:
    if metric not in (None, "validation_loss"):
        raise UserError(f"{metric} was not measured alike within {NEAR:.0%} of this budget: evaluate checkpoints there")
    if other := differing_rows([found for group in both for found in group.runs]):
        raise UserError(
            f"other validation rows ({', '.join(other)}): evaluate both alike (`mythos eval`) to compare bits per byte"
        )
    own, others = (np.array([[_at(found.run, axis, budget)] for found in group.runs]) for group in both)
    found = statistics.difference(own, others)
    if not np.isfinite(found.estimate):
        raise UserError("a run has no validation before this budget: validate more often")
    return "validation_loss", "runs", found, judgement(found.verdict(min(len(own), len(others))), "validation_loss")


def _at(run: RunResult, axis: Axis, budget: float) -> float:
    """The validation loss at a budget; NaN before the first validation."""
    spent = getattr(run.curve, axis)
    begun = spent > 0
    return float(np.interp(np.log(budget), np.log(spent[begun]), run.curve.losses[begun], left=np.nan))
