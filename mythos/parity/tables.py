"""Tables and other Markdown that reports of arms share."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos.drawing import png
from mythos.errors import UserError, os_errors_as_user_errors
from mythos.files import write_atomically
from mythos.parity.measures import OF_PROBLEMS, OF_TEXT, Arm, higher_is_better
from mythos.parity.results import RunResult
from mythos.parity.statistics import Interval, Verdict, mean
from mythos.parity.verdict import compared, mean_of, spread
from mythos.plan.params import count_parameters

REMEDY = "free space, or name another directory"
PREFERRED = ("accuracy", "bits_per_byte", "loss", "validation_loss")
"""Of the metrics that were measured, the first one counts."""
ONE_SEED = "no claim: one seed is no verdict"


@dataclass(frozen=True)
class Picture:
    """A figure, and what it shows."""

    figure: Any
    text: str


def write_files(
    parts: Iterable[str], numbers: Mapping[str, Any], pictures: Mapping[str, Picture], directory: Path
) -> Path:
    """Write the pictures, report.json, and report.md of these parts; returns the path of report.md.

    Raises:
        UserError: the files cannot be written.
    """
    with os_errors_as_user_errors(directory, REMEDY):
        directory.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            write_atomically(directory / f"{name}.png", png(picture.figure))
        write_atomically(directory / "report.json", json.dumps(numbers, indent=1))
        write_atomically(directory / "report.md", "\n\n".join(parts) + "\n")
    return directory / "report.md"


def measured_metrics(arms: Sequence[Arm], first: str, others: Sequence[str] = ()) -> list[str]:
    """What all arms were measured by; ``first`` comes first, ``others`` beside those of text or problems."""
    items = arms[0].runs[0].items
    wanted = (*(OF_PROBLEMS if "problems_difficulty" in items else OF_TEXT), *others)
    return [first, *(name for name in wanted if name != first and is_measured(arms, name))]


def is_measured(arms: Sequence[Arm], metric: str) -> bool:
    try:
        return all(math.isfinite(arm.values(metric).mean()) for arm in arms)
    except UserError:
        return False


def arms_text(arms: Sequence[Arm], metrics: Sequence[str], word: str = "arm") -> Iterator[str]:
    """One row for each arm: size, cost and results; ``word``: what the report calls an arm."""
    yield f"## {word.capitalize()}s"
    heads = [word, "seeds", "parameters", "of which matrices", "tokens", "text tokens", "training FLOPs"]
    heads += ["device hours", *(f"{name}: mean (spread over seeds) and 95% interval" for name in metrics), "perplexity"]
    rows = []
    for arm in arms:
        count = count_parameters(arm.runs[0].config.model)
        cells = [arm.name, str(len(arm.runs)), f"{count.total:,}", f"{count.matrices:,}"]
        cells += [_mean(arm, lambda run: run.tokens), _mean(arm, lambda run: run.text_tokens)]
        cells += [_mean(arm, lambda run: run.curve.flops[-1]), _mean(arm, lambda run: run.curve.hours[-1])]
        for name in metrics:
            values = arm.values(name)
            interval = bounds(mean_of(arm, name)) if values.size > 1 else "-"
            cells.append(f"{values.mean():.4f} ({spread(values):.4f}) {interval}")
        cells.append(f"{arm.mean_metric('documents_perplexity'):.3f}")
        rows.append([cells[0], *(cell.replace("nan", "-") for cell in cells[1:])])
    yield table(heads, "l" + "r" * (len(heads) - 1), rows)


def differences_text(arms: Sequence[Arm], large: str, metrics: Sequence[str]) -> Iterator[str]:
    """Every arm against the large standard model."""
    others = [arm for arm in arms if arm.name != large]
    reference = next((arm for arm in arms if arm.name == large), None)
    if reference is None or not others:
        return
    yield f"## Differences from {large}"
    rows = []
    for arm in others:
        for name in metrics:
            found, verdict = compared(arm, reference, name)
            rows.append([arm.name, name, f"{found.estimate:+.4f}", bounds(found), judgement(verdict, name)])
    yield table(["arm", "metric", "difference", "95% interval", ""], "llrrl", rows)


def depths_text(arms: Sequence[Arm], metric: str) -> Iterator[str]:
    """What other loop steps at test time change, in pairs of the same seed and document."""
    rows = []
    for arm in arms:
        for depth in arm.measured_depths:
            if depth == arm.depth:
                continue
            changes_SN = arm.values(metric, depth) - arm.values(metric)
            found = mean(changes_SN)
            by_seed = ", ".join(f"{change:+.3g}" for change in changes_SN.mean(axis=1))
            verdict = judgement(found.verdict(len(changes_SN)), metric)
            place = [arm.name, f"{depth} in place of {arm.depth}"]
            interval = f"{found.low:.3g} ... {found.high:.3g}"  # changes may be tiny and the same for all seeds
            rows.append([*place, f"{found.estimate:+.3g}", interval, by_seed, verdict])
    if rows:
        yield "## Loop steps at test time"
        yield table(["arm", "loop steps", f"change in {metric}", "95% interval", "by seed", ""], "llrrrl", rows)


def judgement(verdict: Verdict, metric: str) -> str:
    """What a difference in a metric means: better, worse, not distinguished, or no claim."""
    match verdict:
        case "lower":
            return "worse" if higher_is_better(metric) else "better"
        case "higher":
            return "better" if higher_is_better(metric) else "worse"
        case "one seed":
            return ONE_SEED
    return verdict


def pictures_text(pictures: Mapping[str, Picture]) -> Iterator[str]:
    """The pictures, each with what it shows."""
    for name, picture in pictures.items():
        yield f"![{name}]({name}.png)"
        yield picture.text


def left_out_text(left_out: Sequence[str]) -> Iterator[str]:
    """What was not used, with the reason."""
    if left_out:
        yield "## Left out"
        yield "\n".join(f"- {each}" for each in left_out)


def run_numbers(run: RunResult) -> dict[str, Any]:
    """What a report says of one run, for scripts."""
    return {
        "seed": run.config.seed,
        "step": run.step,
        "tokens": run.tokens,
        "training_flops": float(run.curve.flops[-1]),
        "device_hours": float(run.curve.hours[-1]),
        "curve": {name: values.tolist() for name, values in vars(run.curve).items()},
        "evaluation": {name: value for name, value in run.evaluation.items() if name.startswith("eval/")},
    }


def table(heads: Sequence[str], columns: str, rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; ``columns`` has an l (left) or an r (right) for each column."""
    rule = "".join("|---:" if each == "r" else "|---" for each in columns) + "|"
    head, *lines = ("| " + " | ".join(cells) + " |" for cells in (heads, *rows))
    return "\n".join([head, rule, *lines])


def row(name: str, interval: Interval | None) -> list[str]:
    """Of a table: a quantity, its estimate and its interval."""
    assert interval is not None
    return [name, f"{interval.estimate:+.4f}", bounds(interval)]


def bounds(interval: Interval) -> str:
    return f"{interval.low:.4f} ... {interval.high:.4f}"


def _mean(arm: Arm, value: Callable[[Any], float | None]) -> str:
    """The mean over the runs, in three digits."""
    found = [each for run in arm.runs if (each := value(run)) is not None]
    return f"{sum(found) / len(found):.3g}" if found else "-"
