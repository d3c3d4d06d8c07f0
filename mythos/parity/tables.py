"""Tables and other Markdown that reports of arms share."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mythos.errors import UserError
from mythos.parity import statistics
from mythos.parity.measures import Arm, higher_is_better
from mythos.parity.results import RunResult
from mythos.parity.statistics import Interval, Verdict
from mythos.parity.verdict import compared, spread
from mythos.plan.params import count_parameters

OF_TEXT = ("loss", "bits_per_byte")
OF_PROBLEMS = ("accuracy", "accuracy_beyond")
PREFERRED = ("accuracy", "bits_per_byte", "loss", "validation_loss")
"""Of the metrics that were measured, the first one counts."""
ONE_SEED = "no claim: one seed is no verdict"


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
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    for arm in arms:
        count = count_parameters(arm.runs[0].config.model)
        cells = [arm.name, str(len(arm.runs)), f"{count.total:,}", f"{count.matrices:,}"]
        cells += [_mean(arm, lambda run: run.tokens), _mean(arm, lambda run: run.text_tokens)]
        cells += [_mean(arm, lambda run: run.curve.flops[-1]), _mean(arm, lambda run: run.curve.hours[-1])]
        for name in metrics:
            values = arm.values(name)
            interval = bounds(statistics.mean(values)) if values.size > 1 else "-"
            cells.append(f"{values.mean():.4f} ({spread(values):.4f}) {interval}")
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
            text = judgement(verdict, name)
            lines.append(f"| {arm.name} | {name} | {found.estimate:+.4f} | {bounds(found)} | {text} |")
    yield "\n".join(lines)


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


def pictures_text(pictures: Mapping[str, str]) -> Iterator[str]:
    """The pictures, each with what it shows."""
    for name, text in pictures.items():
        yield f"![{name}]({name}.png)"
        yield text


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


def row(name: str, interval: Interval | None) -> str:
    assert interval is not None
    return f"| {name} | {interval.estimate:+.4f} | {bounds(interval)} |"


def bounds(interval: Interval) -> str:
    return f"{interval.low:.4f} ... {interval.high:.4f}"


def _mean(arm: Arm, value: Callable[[Any], float | None]) -> str:
    """The mean over the runs, in three digits."""
    found = [each for run in arm.runs if (each := value(run)) is not None]
    return f"{sum(found) / len(found):.3g}" if found else "-"
