"""One run, several budgets: from a constant phase, a decay of the learning rates to each (WSD: Hu et al. 2024,
arXiv 2404.06395; a decay to each of several budgets: Wen et al. 2024, arXiv 2410.05192).

    updates of the weights    0 ────────── s1 ────────── s2 ────────── s3 ───── b3 = train.steps
                                            └── b1        └── b2

The decay to a budget b begins after s = b - round(b * optim.cooldown_fraction) updates. At its end the run goes back to
the checkpoint before it, and continues the constant phase with the data that follows there. So the model at b is, bit
for bit, that of a run with ``train.steps`` = b. A run whose ``train.steps`` is raised after its end continues alike.

The steps of a run count all updates; ``updates`` counts those of the present weights, on which the schedule depends.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mythos.config.optim_schema import Optim
from mythos.config.schema import Config
from mythos.plan.schedule import cooldown_start
from mythos.readers import Count


@dataclass(frozen=True)
class Decay:
    """A decay that has begun."""

    budget: Count
    start: Count
    """Updates of the weights at its beginning."""
    before: Count | None
    """Step of the run at its beginning, and so of its checkpoint; None if there is no such checkpoint."""
    end: Count | None = None
    """Step of the run at its end."""
    reached: bool = True
    """Whether it ended at its budget; otherwise the configuration has changed before."""


@dataclass(frozen=True)
class Position:
    """How far a run is."""

    step: int = 0
    updates: int = 0
    decays: tuple[Decay, ...] = ()

    @property
    def decay(self) -> Decay | None:
        """The decay that is in progress."""
        return self.decays[-1] if self.decays and self.decays[-1].end is None else None

    @property
    def is_decayed(self) -> bool:
        """Whether the present weights are those at the end of a decay."""
        return bool(self.decays) and (self.decays[-1].end, self.decays[-1].budget) == (self.step, self.updates)

    @property
    def checkpoint(self) -> int | None:
        """The step of the checkpoint that holds the present weights, after a save or a return; None for the first."""
        last = self.decays[-1] if self.decays else None
        has_returned = last is not None and (last.end, last.start) == (self.step, self.updates)
        return last.before if last and has_returned else self.step or None

    @property
    def kept(self) -> frozenset[int]:
        """Steps of the checkpoints before and after decays, which are never removed."""
        before = {decay.before for decay in self.decays if decay.before is not None}
        return frozenset(before | {decay.end for decay in self.decays if decay.end is not None and decay.reached})

    def after_update(self) -> "Position":
        """One update later; a decay that has reached its budget is ended."""
        step, updates, decay = self.step + 1, self.updates + 1, self.decay
        if decay is None or updates < decay.budget:
            return Position(step, updates, self.decays)
        return Position(step, updates, (*self.decays[:-1], replace(decay, end=step)))

    def without_way_back(self) -> "Position":
        """The same, if the checkpoint before the last decay is gone."""
        return replace(self, decays=(*self.decays[:-1], replace(self.decays[-1], before=None)))


@dataclass(frozen=True)
class Course:
    """The budgets of a run, as its configuration has them."""

    optim: Optim
    steps: int
    earlier: Sequence[int] = ()

    def undone(self, position: Position) -> Decay | None:
        """The decay that the run goes back from: it has ended and a budget is left, or its budget is no longer one."""
        last = position.decays[-1] if position.decays else None
        if last is None or last.before in (None, last.end) or not (position.is_decayed or position.decay):
            return None
        if last.budget in self._budgets and last.end is None:
            return None
        return last if self._next(self._back(position)) is not None else None

    def target(self, position: Position) -> int | None:
        """The budget that the run trains for now; None if all are reached."""
        position = self.on_course(position)
        decay = position.decay
        return decay.budget if decay and decay.budget in self._budgets else self._next(position)

    def on_course(self, position: Position) -> Position:
        """Where the run continues: the same, or the position before a decay that is undone."""
        return position if self.undone(position) is None else self._back(position)

    def begin_decay(self, position: Position) -> Position:
        """With a new decay, if the next update is the first one in it."""
        target = self.target(position)
        if target is None or position.decay or position.updates < cooldown_start(self.optim, target):
            return position
        return replace(position, decays=(*position.decays, Decay(target, position.updates, position.checkpoint)))

    def begins_decay(self, position: Position) -> bool:
        """Whether the next update is the first one of a decay."""
        return not position.is_decayed and self.begin_decay(position) is not position

    def last_step(self, position: Position) -> int:
        """The step at which the run will have reached all budgets."""
        while (target := self.target(position)) is not None:
            position = self.begin_decay(self.on_course(position))
            if position.decay is None:  # to the step before the decay
                ahead = cooldown_start(self.optim, target) - position.updates
            else:
                ahead = target - position.updates - 1
            position = replace(position, step=position.step + ahead, updates=position.updates + ahead)
            if position.decay is not None:
                position = position.after_update()
        return position.step

    def passed(self, position: Position) -> list[int]:
        """The earlier budgets that the weights have passed without a decay to them."""
        position = self.on_course(position)
        reached = {decay.budget for decay in position.decays}
        return [budget for budget in self.earlier if budget <= position.updates and budget not in reached]

    @property
    def _budgets(self) -> set[int]:
        return {*self.earlier, self.steps}

    def _next(self, position: Position) -> int | None:
        """The budget whose decay begins first, of those that are neither reached nor passed."""
        reached = {decay.budget for decay in position.decays if decay.end is not None and decay.reached}
        left = [budget for budget in self._budgets - reached if budget > position.updates]
        return min(left, key=lambda budget: (cooldown_start(self.optim, budget), budget), default=None)

    def _back(self, position: Position) -> Position:
        *others, last = position.decays
        ended = last if last.end is not None else replace(last, end=position.step, reached=False)
        return Position(position.step, last.start, (*others, ended))


def course_of(config: Config) -> Course:
    """The course that a configuration describes."""
    return Course(config.optim, config.train.steps, config.train.budgets or ())
