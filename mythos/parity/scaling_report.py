"""The report of scaling laws: constants with intervals, held-out errors, the optimum at a budget, and pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from mythos.drawing import new_figure
from mythos.errors import UserError
from mythos.parity.pictures import COLORS
from mythos.parity.scaling import CONSTANTS, Fit, Form, Law, fit, power_law
from mythos.parity.scaling_runs import Candidates, Optimum, Points, ScalingPoint, candidates
from mythos.parity.statistics import TAILS
from mythos.parity.tables import Picture, left_out_text, pictures_text, table, write_files

FORMULAS = {
    "chinchilla": "E + A N^-a + B D^-b, N: parameters",
    "parcae": "E + A N^-a + B D^-b, N: parameters of the unrolled model",
    "recurrence": "E + A (N_once + R^phi N_loop)^-a + B D^-b",
}
NAMES = ("E", "A", "a", "B", "b", "phi")
"""Of the constants; a law has the first ``CONSTANTS`` of them."""
BUDGETS = 4.0 ** np.arange(-2, 3)
"""Around the budget whose optimum is wanted: from them, how the optimum grows."""
NOTES = """L is the validation loss at the mean depth of training, D the positions trained on, R the mean loop steps.
Intervals are by bootstrap over runs: another choice of models and budgets is not in them. The held-out error is that of
the runs with the most training FLOPs, predicted by the law that was fitted to the others. An optimum beyond the models,
depths and budgets of these runs is an extrapolation."""


def fit_all(points: Points, forms: Sequence[Form]) -> tuple[dict[Form, Fit], list[str]]:
    """Each law that the runs determine, and why the others are missing.

    Raises:
        UserError: they determine none.
    """
    runs, fits, missing = points.runs(), {}, []
    for form in forms:
        try:
            fits[form] = fit(form, runs)
        except UserError as error:
            missing.append(str(error))
    if not fits:
        raise UserError("; ".join(dict.fromkeys(missing)))
    return fits, missing


def constants(found: Fit) -> list[list[str]]:
    """A row for each constant: its name, value and 95% interval."""
    rows = []
    for name in NAMES[: CONSTANTS[found.law.form]]:
        low, high = found.interval(attrgetter(name))
        rows.append([name, f"{getattr(found.law, name):.4g}", f"{low:.4g} ... {high:.4g}"])
    return rows


def errors(found: Fit) -> list[list[str]]:
    """Rows with the mean relative errors of the fit and on the largest runs."""
    rows = [["error of the fit", f"{found.error:.2%}", ""]]
    if found.held_out is None:
        return [*rows, ["held-out error", "-", "too few runs but the largest ones"]]
    size = np.abs(found.held_out.errors)
    count = f"{len(size)} largest run" + ("s" if len(size) > 1 else "")
    return [*rows, ["held-out error", f"{size.mean():.2%}", f"{count}, largest {size.max():.2%}"]]


def optimum(points: Sequence[ScalingPoint], found: Fit, flops: float) -> list[list[str]]:
    """Rows with the best of the models at a budget, and how the optimum grows with the budget."""
    models = candidates(points)
    chosen, drawn = models.best(found.law, flops), [models.best(law, flops) for law in found.drawn]

    def row(name: str, form: str, value: Callable[[Optimum], float]) -> list[str]:
        low, high = np.quantile([value(each) for each in drawn], TAILS)
        return [name, f"{value(chosen):{form}}", f"{low:{form}} ... {high:{form}}"]

    rows = [["best model", chosen.model, "the largest" if chosen.model == models.models[-1] else ""]]
    if any(point.config.loop for point in points):
        rows.append(row("mean loop steps", "g", lambda each: each.loop_steps))
        rows[-1][2] += ", the most tried" if chosen.loop_steps == models.loop_steps.max() else ""
    rows += [row("tokens", ".3g", lambda each: each.tokens), row("loss", ".4f", lambda each: each.loss)]
    values: dict[str, Callable[[Optimum], float]] = {"N": lambda each: each.size, "tokens": lambda each: each.tokens}
    for name, value in values.items():
        low, high = found.interval(partial(_growth, models, flops, value))
        grows = _growth(models, flops, value, found.law)
        rows.append([f"{name} of the best model ~ FLOPs^", f"{grows:.2f}", f"{low:.2f} ... {high:.2f}"])
    return rows


def _growth(models: Candidates, flops: float, value: Callable[[Optimum], float], law: Law) -> float:
    """The exponent of the best model's size or tokens over the budget, around ``flops``."""
    budgets = flops * BUDGETS
    return power_law(budgets, np.array([value(models.best(law, budget)) for budget in budgets]))[1]


def write_scaling(
    points: Points, fits: Mapping[Form, Fit], missing: Sequence[str], flops: float, directory: Path
) -> Path:
    """Write report.md, its pictures and report.json to a directory; returns the path of report.md.

    Raises:
        UserError: the files cannot be written.
    """
    pictures = {
        "curves": Picture(
            _curves(points, fits),
            "The loss against tokens: dots are trained models, lines the law for each configuration.",
        ),
        "errors": Picture(
            _errors(points, fits),
            "The relative error of each law on each run; filled: runs that it was not fitted to.",
        ),
        "optimum": Picture(
            _optimum(points.points, fits, flops),
            "The loss by each law of the models at the budget, against their size N; the circle is the optimum.",
        ),
    }
    parts = [f"# Scaling laws of {len(points.points)} trained models", *_laws_text(points, fits, flops), NOTES]
    parts += [*pictures_text(pictures), *_points_text(points), *left_out_text([*missing, *points.left_out])]
    return write_files(parts, _numbers(points, fits, flops), pictures, directory)


def _laws_text(points: Points, fits: Mapping[Form, Fit], flops: float) -> Iterator[str]:
    for form, found in fits.items():
        yield f"## {form}: L = {FORMULAS[form]}"
        rows = [*constants(found), *errors(found), [f"**optimum at {flops:.3g} FLOPs**", "", ""]]
        rows += optimum(points.points, found, flops)
        yield table(["quantity", "value", "95% interval"], "lrl", rows)


def _points_text(points: Points) -> Iterator[str]:
    yield "## Trained models"
    heads = ["model", "N once", "N of the loop", "loop steps", "tokens", "training FLOPs", "loss"]
    rows = []
    for each in points.points:
        cells = [each.name, f"{each.once:.4g}", f"{each.looped:.4g}", f"{each.loop_steps:g}"]
        cells += [f"{each.end.tokens:.4g}", f"{each.end.flops:.4g}", f"{each.end.loss:.4f}"]
        rows.append(cells)
    yield table(heads, "lrrrrrr", rows)


def _curves(points: Points, fits: Mapping[Form, Fit]) -> Any:
    figure, (axes,) = new_figure(len(fits))
    groups = list(dict.fromkeys((each.once, each.looped, each.loop_steps) for each in points.points))
    runs = points.runs()
    tokens = np.geomspace(runs.tokens.min(), runs.tokens.max(), 100)
    for axis, (form, found) in zip(axes, fits.items(), strict=True):
        for (once, looped, steps), color in zip(groups, COLORS * len(groups), strict=False):
            own = (runs.once == once) & (runs.looped == looped) & (runs.loop_steps == steps)
            size = runs.rows(own).size(found.law.phi)[0]
            loops = f", {steps:g} loop steps" if looped else ""
            axis.plot(runs.tokens[own], runs.losses[own], "o", color=color, markersize=4)
            axis.plot(
                tokens, found.law.loss(size, tokens), color=color, linewidth=1, label=f"{once + looped:.3g}{loops}"
            )
        axis.set(title=form, xlabel="tokens", ylabel="validation loss", xscale="log")
        axis.tick_params(axis="x", which="minor", labelsize=6)
        axis.grid(alpha=0.3)
    legend = axes[0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside right upper", fontsize="x-small", title="parameters", title_fontsize="x-small")
    return figure


def _errors(points: Points, fits: Mapping[Form, Fit]) -> Any:
    figure, ((axis,),) = new_figure(1, width=6.4)
    runs = points.runs()
    for (form, found), color in zip(fits.items(), COLORS, strict=False):
        axis.plot(runs.flops, found.law.predict(runs) / runs.losses - 1, "o", fillstyle="none", color=color, label=form)
        if found.held_out is not None:
            axis.plot(runs.flops[found.held_out.rows], found.held_out.errors, "o", color=color)
    axis.axhline(0, color="0.5", linewidth=1)
    axis.set(xlabel="training FLOPs", ylabel="predicted / measured loss - 1", xscale="log")
    axis.yaxis.set_major_formatter("{x:.1%}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def _optimum(points: Sequence[ScalingPoint], fits: Mapping[Form, Fit], flops: float) -> Any:
    figure, (axes,) = new_figure(len(fits))
    models = candidates(points)
    names = list(dict.fromkeys(models.models))
    for axis, (form, found) in zip(axes, fits.items(), strict=True):
        sizes, losses, chosen = models.sizes(found.law), models.losses(found.law, flops), models.best(found.law, flops)
        for model, color in zip(names, COLORS * len(names), strict=False):
            own = [each == model for each in models.models]
            axis.plot(sizes[own], losses[own], ".-", color=color, linewidth=1, label=model)
        axis.plot(chosen.size, chosen.loss, "o", color="black", fillstyle="none", markersize=9)
        axis.set(title=f"{form}, {flops:.2g} FLOPs", xlabel="N", ylabel="loss by the law", xscale="log")
        axis.tick_params(axis="x", which="minor", labelsize=6)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    return figure


def _numbers(points: Points, fits: Mapping[Form, Fit], flops: float) -> dict[str, Any]:
    models = candidates(points.points)
    laws = {
        form: {
            **asdict(found.law),
            "intervals": {name: found.interval(attrgetter(name)) for name in NAMES},
            "error": found.error,
            "held_out_errors": None if found.held_out is None else found.held_out.errors.tolist(),
            "optimum": {"flops": flops, **asdict(models.best(found.law, flops))},
        }
        for form, found in fits.items()
    }
    columns = {name: values.tolist() for name, values in vars(points.runs()).items()}
    return {"laws": laws, "runs": {"name": [each.name for each in points.points], **columns}}
