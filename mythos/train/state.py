"""The state of a run besides the weights and the optimizer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, TypeAdapter

from mythos.checkpoint.manifest import REMEDY
from mythos.errors import UserError
from mythos.plan.budgets import Course, Decay, Position
from mythos.readers import Count, check_value
from mythos.run.anomalies import LossStatistics
from mythos.run.directory import STATE_FILE
from mythos.run.tensorboard import GFLOP, CurvePosition


@dataclass
class RunState:
    """The position of a run, saved as state.json in every checkpoint; the same on every rank.

    ``data`` identifies the data that ``samples`` counts (see ``mythos.data.open``); ``samples`` is the position in the
    stream, which also counts the sequences that a rewind left out. ``epochs`` is the position in each data source.
    """

    data: dict[str, Any]
    run_id: str = ""
    """The run that this is the state of; empty in checkpoints of version 0.1."""
    step: Count = 0
    updates: Count = 0
    """Of the present weights: fewer than ``step`` once the run has gone back from a decay."""
    decays: list[Decay] = field(default_factory=list)
    samples: Count = 0
    tokens: Count = 0
    text_tokens: Count | None = None
    """Of ``tokens``, those whose target is text; None if not all of the data, or a version before, counted them."""
    flops: FiniteFloat | None = None
    """Model FLOPs of the training; None if a version before, which did not count them, began the run."""
    skipped_steps: Count = 0
    bad_steps_in_a_row: Count = 0
    rewinds: Count = 0
    loss: LossStatistics = field(default_factory=LossStatistics)
    epochs: dict[str, FiniteFloat] = field(default_factory=dict)

    def count(self, sequences: int, tokens: int, text_tokens: int | None, flops: float, applied: bool) -> None:
        """Count a finished step that read these sequences and tokens; its update was applied or skipped."""
        self.position = self.position.after_update()
        self.samples += sequences
        self.tokens += tokens
        if self.text_tokens is not None:
            self.text_tokens = None if text_tokens is None else self.text_tokens + text_tokens
        if self.flops is not None:
            self.flops += flops
        self.bad_steps_in_a_row = 0 if applied else self.bad_steps_in_a_row + 1
        self.skipped_steps += not applied

    @property
    def curve_position(self) -> CurvePosition:
        """How far the curves of the metrics go."""
        return CurvePosition(self.step, self.tokens, None if self.flops is None else int(self.flops / GFLOP))

    @property
    def position(self) -> Position:
        """How far the run is in its schedule."""
        return Position(self.step, self.updates, tuple(self.decays))

    @position.setter
    def position(self, position: Position) -> None:
        self.step, self.updates, self.decays = position.step, position.updates, list(position.decays)

    def back_before_decay(self, saved: "RunState", course: Course) -> "RunState":
        """The state after going back to the checkpoint before a decay: its weights and data, but the run's counters."""
        state = replace(saved, data=self.data, run_id=self.run_id, rewinds=self.rewinds)
        state.skipped_steps, state.position = self.skipped_steps, course.on_course(self.position)
        return state

    def rewound_to(self, saved: "RunState") -> "RunState":
        """The state after going back to a checkpoint: its step and weights, but the data read since is left out."""
        return replace(saved, samples=self.samples, rewinds=self.rewinds + 1, data=self.data)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, checkpoint: Path, saved: Mapping[str, Any]) -> "RunState":
        """The state in a checkpoint's state.json, whose other fields are ignored. Raises UserError, on all ranks."""
        try:
            values = {"updates": saved.get("step"), **saved}  # earlier versions did not go back from decays
            return check_value(checkpoint / STATE_FILE, values, _RUN_STATE, REMEDY)
        except UserError as error:
            raise UserError(str(error), agreed=True) from error


_RUN_STATE = TypeAdapter(RunState)
