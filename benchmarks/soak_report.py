"""Whether the disturbed run of ``benchmarks.soak`` equals the undisturbed one, and what the faults cost."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from mythos.readers import read_json_lines
from mythos.run.metrics import read_metrics
from tests.faults.victim import STEPS_FILE, sequences

SHOWN = 5
"""Differences of one sort that are printed."""


@dataclass(frozen=True)
class StepRecord:
    """A step that was finished, whether it counted in the end or not."""

    step: int
    attempt: str
    began: float
    ended: float


_STEP_RECORD = TypeAdapter(StepRecord)


@dataclass(frozen=True)
class Cost:
    """What a fault cost."""

    kind: str
    next_step_s: float
    """From the fault to the end of the next step, which may be one that had been done before."""
    lost_steps: int
    """Finished steps that were done again."""
    ended_attempt: bool
    """False if the training continued during the fault."""


@dataclass(frozen=True)
class Outcome:
    """What a run that is done has left: its losses, and what each step consumed."""

    losses: list[tuple[int, float]]
    """Step and loss of each line of metrics.jsonl, in its order."""
    sequences: dict[int, list[str]]
    """Step -> hashes of the sequences that its last attempt consumed."""
    counted_s: float
    """Wall time of the steps in metrics.jsonl, each once."""


def read_records(directory: Path, last_bytes: int | None = None) -> list[StepRecord]:
    """The finished steps of all attempts, in order; only those in the last bytes of the file, if given."""
    return list(read_json_lines(directory / STEPS_FILE, _STEP_RECORD, last_bytes))


def read_outcome(directory: Path, run: Path) -> Outcome:
    """Of the run in ``run``, whose ranks have recorded their sequences in ``directory``."""
    lines = [line for line in read_metrics(run) if "train/loss" in line]
    return Outcome(
        [(line["step"], line["train/loss"]) for line in lines],
        sequences(directory),
        sum(line["perf/step_seconds"] for line in lines),
    )


def cost(kind: str, at: float, records: Sequence[StepRecord], ends_attempt: bool) -> Cost | None:
    """The cost of a fault that occurred at a time; None while no later step is finished.

    Args:
        ends_attempt: after the fault, steps of the same attempt do not count as the next step.
    """
    earlier = {record.attempt for record in records if record.began <= at}
    after = [record for record in records if record.began > at]
    following = [record for record in after if record.attempt not in earlier] if ends_attempt else after
    if not following:
        return None
    resumed = following[0]
    previous = max((record for record in records if record.began < resumed.began), key=lambda each: each.began)
    return Cost(kind, resumed.ended - at, previous.step - resumed.step + 1, ends_attempt)


def judge(expected: Outcome, found: Outcome) -> list[str]:
    """The differences between a disturbed run and the undisturbed one, a line each; none if they are equal.

    Losses must be equal bit for bit, and each sequence must be consumed once.
    """
    differences = []
    if [step for step, _ in found.losses] != [step for step, _ in expected.losses]:
        differences.append(f"{len(found.losses)} losses instead of {len(expected.losses)}, or in another order")
    losses = dict(found.losses)
    wrong = [(step, loss, losses[step]) for step, loss in expected.losses if losses.get(step, loss) != loss]
    differences += [f"step {step}: loss {other!r} instead of {loss!r}" for step, loss, other in wrong[:SHOWN]]
    if len(wrong) > SHOWN:
        differences.append(f"{len(wrong)} losses differ")
    changed = [step for step, each in expected.sequences.items() if found.sequences.get(step) != each]
    changed += sorted(found.sequences.keys() - expected.sequences.keys())
    differences += [f"step {step}: other sequences than in the undisturbed run" for step in changed[:SHOWN]]
    counts = Counter(name for each in found.sequences.values() for name in each)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        differences.append(f"{len(twice)} sequences were consumed more than once, for example {twice[0]}")
    return differences


def table(costs: Sequence[Cost]) -> list[str]:
    """Lines with the costs by kind, and of all faults that ended an attempt."""
    groups: dict[str, list[Cost]] = {}
    for each in sorted(costs, key=lambda each: each.kind):
        groups.setdefault(each.kind, []).append(each)
    groups["all that ended an attempt"] = [each for each in costs if each.ended_attempt]
    width = max(map(len, groups))
    lines = [f"{'fault':<{width}} {'times':>5} {'next step in s: median':>22} {'worst':>6} {'lost steps':>10}"]
    for kind, group in groups.items():
        seconds = [each.next_step_s for each in group] or [0.0]
        lost = sum(each.lost_steps for each in group)
        lines.append(
            f"{kind:<{width}} {len(group):>5} {statistics.median(seconds):>22.1f} {max(seconds):>6.1f} {lost:>10}"
        )
    return lines


def summary(undisturbed: Outcome, found: Outcome, finished_steps: int, wall_s: float) -> list[str]:
    """The figures of the whole run.

    Args:
        finished_steps: of all attempts, those that were done again included.
        wall_s: from the first submission to the end.
    """
    steps = len(found.losses)
    return [
        f"time in steps that counted: {found.counted_s:.0f} s of {wall_s:.0f} s ({found.counted_s / wall_s:.0%}); "
        f"the same steps undisturbed: {undisturbed.counted_s:.0f} s",
        f"lost steps: {finished_steps - steps} (finished: {finished_steps}, counted: {steps})",
    ]
