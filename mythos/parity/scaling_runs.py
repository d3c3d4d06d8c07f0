"""Runs as points of a scaling law: the end of every finished run, and of the decay to each budget of one.

The learning rate has decayed there, so the losses can be compared (docs/parity.md). Parameters are all of the model, or
those that a token uses (``active``, of experts), or without lookup tables and norms (``matrices``).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.parity.groups import Found, attempt, differing_rows, read_groups
from mythos.parity.results import Point
from mythos.parity.scaling import Law, Runs, effective_size
from mythos.plan.flops import expected_steps, training_flops
from mythos.plan.params import NOT_MATRICES, count_parameters
from mythos.plan.tensors import parameters
from mythos.run.directory import newest_checkpoint
from mythos.run.status import read_status

Counted = Literal["total", "active", "matrices"]
LOOP = "loop."
"""What the names of the loop's parameters begin with."""
LARGEST_DEPTH = 64
"""Of the candidates of an optimum."""


@dataclass(frozen=True)
class ScalingPoint:
    """A trained model."""

    name: str
    config: Config
    once: float
    looped: float
    end: Point

    @property
    def loop_steps(self) -> float:
        """Mean in training; 1 of a dense model."""
        return 1.0 if self.config.loop is None else self.config.loop.mean_depth


@dataclass(frozen=True)
class Optimum:
    """The best model for a budget of training FLOPs, by a law."""

    model: str
    loop_steps: float
    size: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Candidates:
    """Models that could be trained, each (candidates,)."""

    models: tuple[str, ...]
    """From small to large."""
    once: np.ndarray
    looped: np.ndarray
    loop_steps: np.ndarray
    flops_per_token: np.ndarray

    def sizes(self, law: Law) -> np.ndarray:
        """N of each."""
        return effective_size(self.once, self.looped, self.loop_steps, law.phi)

    def losses(self, law: Law, flops: float) -> np.ndarray:
        """The loss of each, trained with so many FLOPs."""
        return law.loss(self.sizes(law), flops / self.flops_per_token)

    def best(self, law: Law, flops: float) -> Optimum:
        """The one with the lowest loss."""
        losses = self.losses(law, flops)
        row = int(losses.argmin())
        steps, tokens = float(self.loop_steps[row]), float(flops / self.flops_per_token[row])
        return Optimum(self.models[row], steps, float(self.sizes(law)[row]), tokens, float(losses[row]))


@dataclass(frozen=True)
class Points:
    """What was found in runs, and what was left out, with the reason."""

    points: tuple[ScalingPoint, ...]
    left_out: tuple[str, ...]

    def runs(self) -> Runs:
        """As arrays."""
        rows = [
            (each.once, each.looped, each.loop_steps, each.end.tokens, each.end.flops, each.end.loss)
            for each in self.points
        ]
        return Runs(*np.array(rows, dtype=float).reshape(-1, 6).T)


def read_points(places: Sequence[Path], counted: Counted) -> Points:
    """The finished runs in these directories, or below them, and the budgets that unfinished ones have reached.

    Raises:
        UserError: a place has no run, nothing is finished, or the runs were not validated on the same rows.
    """
    grouped = read_groups(places)
    points, left_out = [], list(grouped.left_out)
    for group in grouped.groups:
        for found in group.runs:
            ends = attempt(partial(_ends, found), left_out)
            if ends == []:
                left_out.append(f"{found.run.directory}: not finished: its learning rate has not decayed yet")
            points += [_point(found, group.name, end, len(ends or ()) > 1, counted) for end in ends or ()]
    if not points:
        raise UserError("no finished run: " + "; ".join(left_out))
    _check_same_rows([found for group in grouped.groups for found in group.runs])
    return Points(tuple(points), tuple(left_out))


def flops_per_token(config: Config, loop_steps: float) -> float:
    """Expected training FLOPs of a model with this mean depth, whose share of steps with gradient remains the same."""
    if config.loop is None:
        return training_flops(config.model, config.data.sequence_length)
    with_grad = max(1, round(config.loop.backprop_depth * loop_steps / config.loop.mean_depth))
    loop = replace(config.loop, mean_depth=float(loop_steps), backprop_depth=with_grad)  # type: ignore[type-var]
    return training_flops(config.model, config.data.sequence_length, expected_steps(loop))


def candidates(points: Sequence[ScalingPoint]) -> Candidates:
    """The models of the runs, a looped one with every whole mean depth up to a limit.

    The largest depth is twice that of any run, at most ``LARGEST_DEPTH``: the law is not extrapolated further.
    """
    deepest = min(LARGEST_DEPTH, round(2 * max(point.loop_steps for point in points)))
    models = {(point.once + point.looped, point.looped): point for point in points}
    rows, names = [], []
    for (total, looped), point in sorted(models.items(), key=lambda each: each[0]):
        for steps in range(1, deepest + 1) if point.config.loop else (1,):
            rows.append((total - looped, looped, float(steps), flops_per_token(point.config, steps)))
            names.append(f"{total:.4g} parameters" + (" (looped)" if looped else ""))
    return Candidates(tuple(names), *np.array(rows).T)


def _ends(found: Found) -> list[Point]:
    """The validations at the ends of decays, and of the run if it is finished."""
    run = found.run
    _, position = newest_checkpoint(run.directory)
    steps = {decay.end for decay in position.decays if decay.reached} if position else set()
    if read_status(run.directory).state == "finished":
        steps.add(run.step)
    return [point for point in run.points if point.step in steps and point.tokens > 0]


def _point(found: Found, group: str, end: Point, several: bool, counted: Counted) -> ScalingPoint:
    model = found.run.config.model
    count = count_parameters(model)
    excluded = NOT_MATRICES if counted == "matrices" else ()
    looped = sum(each.size for each in parameters(model) if each.name.startswith(LOOP) and each.part not in excluded)
    total = {"total": count.total, "active": count.active, "matrices": count.matrices}[counted]
    looped -= count.idle if counted == "active" else 0  # the core alone has experts
    seed = f"{group}, seed {found.run.config.seed}"
    name = f"{seed}, {end.updates:,} steps" if several else seed
    return ScalingPoint(name, found.run.config, float(total - looped), float(looped), end)


def _check_same_rows(found: Sequence[Found]) -> None:
    first = found[0]
    for each in found:
        if other := differing_rows((first, each)):
            raise UserError(
                f"{each.run.directory} and {first.run.directory} were validated on other rows "
                f"({', '.join(other)}): fit them separately"
            )
