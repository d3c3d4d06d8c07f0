"""The report of an experiment: verdict, arms, differences and pictures, as Markdown, and its numbers as JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from mythos.errors import UserError
from mythos.parity.experiment import Criterion, Experiment, PlannedRun, design_hash
from mythos.parity.measures import Arm, check_same_items
from mythos.parity.pictures import draw_pictures
from mythos.parity.results import read_result
from mythos.parity.runs import Progress, progress, read_designs
from mythos.parity.tables import (
    arms_text,
    depths_text,
    differences_text,
    measured_metrics,
    pictures_text,
    row,
    run_numbers,
    table,
    write_files,
)
from mythos.parity.verdict import Decision, decide, mean_of
from mythos.plan.params import count_parameters


@dataclass(frozen=True)
class Results:
    """What is finished of an experiment, and what is missing."""

    arms: dict[str, Arm]
    missing: tuple[Progress, ...]


def collect(experiment: Experiment, planned: Sequence[PlannedRun]) -> Results:
    """Read all finished runs. Raises UserError if one is damaged."""
    runs: dict[str, list[Any]] = {}
    missing = []
    for each in planned:
        found = progress(experiment, each)
        if found.need == "nothing" and found.evaluation is not None:
            runs.setdefault(each.arm, []).append(read_result(each.directory, found.evaluation))
        else:
            missing.append(found)
    return Results({name: Arm(name, tuple(each)) for name, each in runs.items()}, tuple(missing))


def write_report(experiment: Experiment, planned: Sequence[PlannedRun], directory: Path) -> Path:
    """Write report.md, its pictures and report.json to a directory; returns the path of report.md.

    Raises:
        UserError: nothing is finished, a run is damaged, or the files cannot be written.
    """
    results = collect(experiment, planned)
    if not results.arms:
        raise UserError(f"{experiment.name}: no run is finished and evaluated: see `mythos parity status`")
    arms = list(results.arms.values())
    check_same_items(arms)
    decision = decide(experiment.criterion, results.arms)
    tasks = [Path(task).stem for task in experiment.evaluation.tasks]  # the score of a list, such as core
    metrics = measured_metrics(arms, experiment.criterion.metric, tasks)
    pictures = draw_pictures(arms, metrics[0], experiment.criterion.large)
    parts = [
        f"# {experiment.name}: {experiment.question}",
        *verdict_text(experiment, decision, results),
        *design_text(experiment),
        *arms_text(arms, metrics),
        *differences_text(arms, experiment.criterion.large, metrics),
        *depths_text(arms, metrics[0]),
        *pictures_text(pictures),
        *missing_text(results.missing),
    ]
    return write_files(parts, numbers(experiment, arms, decision, metrics), pictures, directory)


def verdict_text(experiment: Experiment, decision: Decision, results: Results) -> Iterator[str]:
    """The answer by the criterion, with what it rests on."""
    criterion = experiment.criterion
    yield f"## Verdict: {_sentence(criterion, decision)}"
    yield (
        f"By the criterion that was fixed before any run: with d the difference in {criterion.metric} between "
        f"**{criterion.looped}** and **{criterion.large}**, and g the gap between **{criterion.small}** and "
        f"**{criterion.large}**, it matches if the 95% interval of d - {criterion.margin:g} g is below 0, does not "
        "match if it is above, and is not decided otherwise (signs turned for metrics of which more is better)."
    )
    if decision.difference is not None and decision.share is not None:
        share = row("share of the gap that is closed (1: as good as the large one)", decision.share)
        if not isfinite(decision.share.high - decision.share.low):
            share[1:] = ["not defined", f"{criterion.small} and {criterion.large} are not distinguished"]
        rows = [
            row(f"d = {criterion.looped} - {criterion.large}", decision.difference),
            row(f"{criterion.looped} - {criterion.small}", decision.from_small),
            row(f"g = {criterion.small} - {criterion.large}", decision.gap),
            share,
        ]
        yield table(["quantity", "estimate", "95% interval"], "lrr", rows)
        seeds = {name: len(results.arms[name].runs) for name in (criterion.looped, criterion.small, criterion.large)}
        count = ", ".join(f"{name} {number}" for name, number in seeds.items())
        yield f"Training seeds: {count}. Intervals are by paired bootstrap over documents and seeds."


def _sentence(criterion: Criterion, decision: Decision) -> str:
    if decision.answer.startswith("no verdict"):
        return decision.answer
    verb = {"matches": "matches", "does not match": "does not match"}.get(decision.answer)
    if verb is None:
        return f"not decided whether {criterion.looped} matches {criterion.large}"
    return f"{criterion.looped} {verb} {criterion.large}"


def design_text(experiment: Experiment) -> Iterator[str]:
    """Hypothesis and designs."""
    yield "## Design"
    yield f"**Hypothesis.** {experiment.hypothesis}"
    designs = read_designs(experiment)
    now = design_hash(experiment)
    if [each.hash for each in designs] == [now]:
        yield f"The design (hash `{now}`) is the one with which the first run began, at {designs[0].time}."
    elif designs:
        changes = ", ".join(f"`{each.hash}` from {each.time}" for each in designs)
        yield (
            f"**The design was changed after the first run.** Runs began under {changes}; this report is by `{now}`. "
            "A criterion that was chosen with results in sight proves nothing."
        )


def missing_text(missing: Sequence[Progress]) -> Iterator[str]:
    """The runs that are not in this report."""
    if missing:
        yield "## Missing"
        yield "\n".join(f"- {each.run.arm}, seed {each.run.seed}: {each.state}, {each.need} to do" for each in missing)


def numbers(experiment: Experiment, arms: Sequence[Arm], decision: Decision, metrics: Sequence[str]) -> dict[str, Any]:
    """Everything that the report says, for scripts, with what it was made from."""
    return {
        "experiment": experiment.name,
        "design": design_hash(experiment),
        "decision": asdict(decision),
        "arms": {
            arm.name: {
                "parameters": count_parameters(arm.runs[0].config.model).total,
                "depth": arm.depth,
                **{name: asdict(mean_of(arm, name)) for name in metrics},
                "runs": [run_numbers(run) for run in arm.runs],
            }
            for arm in arms
        },
    }
