"""The report of an experiment: verdict, arms, differences and pictures, as Markdown, and its numbers as JSON."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import write_atomically
from mythos.parity import statistics
from mythos.parity.experiment import Criterion, Experiment, PlannedRun, design_hash
from mythos.parity.measures import Arm, check_same_items, higher_is_better
from mythos.parity.pictures import write_pictures
from mythos.parity.results import read_result
from mythos.parity.runs import Progress, progress, read_designs
from mythos.parity.statistics import Interval
from mythos.parity.verdict import Decision, compared, decide, spread
from mythos.plan.params import count_parameters

REMEDY = "free space, or name another directory"
OF_TEXT = ("loss", "bits_per_byte")
OF_PROBLEMS = ("accuracy", "accuracy_beyond")


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
    metrics = measured_metrics(arms, experiment.criterion.metric)
    with os_errors_as_user_errors(directory, REMEDY):
        directory.mkdir(parents=True, exist_ok=True)
        pictures = write_pictures(arms, metrics[0], directory)
        parts = [
            f"# {experiment.name}: {experiment.question}",
            *verdict_text(experiment, decision, results),
            *design_text(experiment),
            *arms_text(arms, metrics),
            *differences_text(arms, experiment.criterion.large, metrics),
            *pictures_text(pictures),
            *missing_text(results.missing),
        ]
        write_atomically(directory / "report.json", json.dumps(numbers(experiment, arms, decision, metrics), indent=1))
        write_atomically(directory / "report.md", "\n\n".join(parts) + "\n")
    return directory / "report.md"


def measured_metrics(arms: Sequence[Arm], first: str) -> list[str]:
    """What all arms were measured by; ``first`` comes first."""
    items = arms[0].runs[0].items
    wanted = OF_PROBLEMS if "problems_difficulty" in items else OF_TEXT
    return [first, *(name for name in wanted if name != first and _is_measured(arms, name))]


def _is_measured(arms: Sequence[Arm], metric: str) -> bool:
    try:
        return all(math.isfinite(arm.values(metric).mean()) for arm in arms)
    except UserError:
        return False


def verdict_text(experiment: Experiment, decision: Decision, results: Results) -> Iterator[str]:
    """The answer by the criterion, with what it rests on."""
    criterion = experiment.criterion
    yield f"## Verdict: {_sentence(criterion, decision)}"
    yield (
        f"By the criterion that was fixed before any run: with d the difference in {criterion.metric} between "
        f"**{criterion.looped}** and **{criterion.large}**, and g the gap between **{criterion.small}** and "
        f"**{criterion.large}**, it matches if the 95% interval of d is below {criterion.margin:g} g, does not match "
        "if it is above, and is not decided otherwise."
    )
    if decision.difference is not None:
        lines = [
            "| quantity | estimate | 95% interval |",
            "|---|---:|---:|",
            _row(f"d = {criterion.looped} - {criterion.large}", decision.difference),
            _row(f"{criterion.looped} - {criterion.small}", decision.from_small),
            _row(f"g = {criterion.small} - {criterion.large}", decision.gap),
            _row("share of the gap that is closed (1: as good as the large one)", decision.share),
        ]
        yield "\n".join(lines)
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


def arms_text(arms: Sequence[Arm], metrics: Sequence[str]) -> Iterator[str]:
    """One row for each arm: size, cost and results."""
    yield "## Arms"
    heads = ["arm", "seeds", "parameters", "of which matrices", "tokens", "text tokens", "training FLOPs"]
    heads += ["device hours", *(f"{name}: mean (spread over seeds) and 95% interval" for name in metrics), "perplexity"]
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for arm in arms:
        count = count_parameters(arm.runs[0].config.model)
        cells = [arm.name, str(len(arm.runs)), f"{count.total:,}", f"{count.matrices:,}"]
        cells += [_mean(arm, lambda run: run.tokens), _mean(arm, lambda run: run.text_tokens)]
        cells += [_mean(arm, lambda run: run.curve.flops[-1]), _mean(arm, lambda run: run.curve.hours[-1])]
        for name in metrics:
            values = arm.values(name)
            cells.append(f"{values.mean():.4f} ({spread(values):.4f}) {_bounds(statistics.mean(values))}")
        cells.append(f"{arm.mean_metric('documents_perplexity'):.3f}")
        lines.append("| " + " | ".join(cells).replace("nan", "-") + " |")
    yield "\n".join(lines)


def differences_text(arms: Sequence[Arm], large: str, metrics: Sequence[str]) -> Iterator[str]:
    """Every arm against the large standard model."""
    others = [arm for arm in arms if arm.name != large]
    reference = next((arm for arm in arms if arm.name == large), None)
    if reference is None or not others:
        return
    yield f"## Differences from {large}"
    lines = ["| arm | metric | difference | 95% interval | |", "|---|---|---:|---:|---|"]
    for arm in others:
        for name in metrics:
            found, verdict = compared(arm, reference, name)
            better = {"lower": higher_is_better(name), "higher": not higher_is_better(name)}
            text = {True: "worse", False: "better"}[better[verdict]] if verdict in better else verdict
            lines.append(f"| {arm.name} | {name} | {found.estimate:+.4f} | {_bounds(found)} | {text} |")
    yield "\n".join(lines)


def pictures_text(pictures: Mapping[str, str]) -> Iterator[str]:
    """The pictures, each with what it shows."""
    for name, text in pictures.items():
        yield f"![{name}]({name}.png)"
        yield text


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
                **{name: asdict(statistics.mean(arm.values(name))) for name in metrics},
                "runs": [
                    {
                        "seed": run.config.seed,
                        "step": run.step,
                        "tokens": run.tokens,
                        "training_flops": float(run.curve.flops[-1]),
                        "device_hours": float(run.curve.hours[-1]),
                        "curve": {name: values.tolist() for name, values in vars(run.curve).items()},
                        "evaluation": {
                            name: value for name, value in run.evaluation.items() if name.startswith("eval/")
                        },
                    }
                    for run in arm.runs
                ],
            }
            for arm in arms
        },
    }


def _row(name: str, interval: Interval | None) -> str:
    assert interval is not None
    return f"| {name} | {interval.estimate:+.4f} | {_bounds(interval)} |"


def _bounds(interval: Interval) -> str:
    return f"{interval.low:.4f} ... {interval.high:.4f}"


def _mean(arm: Arm, value: Callable[[Any], float | None]) -> str:
    """The mean over the runs, in three digits."""
    found = [each for run in arm.runs if (each := value(run)) is not None]
    return f"{sum(found) / len(found):.3g}" if found else "-"
