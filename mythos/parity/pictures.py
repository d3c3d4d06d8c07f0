"""The pictures of a comparison of arms."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mythos.drawing import draw_load, new_figure
from mythos.parity.measures import Arm
from mythos.parity.tables import Picture
from mythos.parity.verdict import compared, mean_of

COLORS = [f"tab:{name}" for name in ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive", "cyan")]


def draw_pictures(arms: Sequence[Arm], metric: str, reference: str | None = None) -> dict[str, Picture]:
    """Draw what there are data for; with a reference, also the differences from that arm, on the same documents."""
    known = next((arm for arm in arms if arm.name == reference), None)
    means = f"The mean {metric} of each arm with its 95% interval; dots are training seeds."
    if known is not None:
        means += (
            f" Right: the difference from {reference} on the same documents, which is known better than either mean."
        )
    pictures = {
        "arms": Picture(_arms(arms, metric, known), means),
        "curves": Picture(
            _curves(arms),
            "The validation loss at the mean depth of training, against what was spent: one line for each seed.",
        ),
    }
    if metric != "validation_loss" and any(len(arm.measured_depths) > 1 for arm in arms):
        pictures["depth"] = Picture(
            _by_depth(arms, metric),
            f"The {metric} against the loop steps at test time, mean over the seeds with its 95% interval; thin: the "
            "seeds; dashed: the mean depth of training; horizontal: arms without a loop.",
        )
    if loads := _loads(arms):
        pictures["experts"] = Picture(
            _experts(loads),
            "Where the tokens go at each loop step, at the mean depth of training: the experts' shares of the choices, "
            "of one seed of each arm, because the experts of seeds do not correspond.",
        )
    if _have_same_difficulties(arms):
        pictures["difficulty"] = Picture(
            _by_difficulty(arms),
            "The share of problems that are solved against their difficulty, at the mean depth of training and "
            "(dotted) at the largest depth measured; shaded: difficulties beyond those of training.",
        )
    return pictures


def _arms(arms: Sequence[Arm], metric: str, reference: Arm | None) -> Any:
    figure, (axes,) = new_figure(2 if reference else 1, width=5 if reference else 7.5, height=1 + 0.45 * len(arms))
    for row, (arm, color) in enumerate(zip(arms, COLORS * len(arms), strict=False)):
        values = arm.values(metric)
        intervals = [mean_of(arm, metric)]
        if reference is not None and arm is not reference:
            intervals.append(compared(arm, reference, metric)[0])
        for axis, found in zip(axes, intervals, strict=False):
            axis.plot([found.low, found.high], [row, row], color=color, linewidth=2)
            axis.plot(found.estimate, row, "D", color=color)
        axes[0].plot(values.mean(axis=1), np.full(len(values), row + 0.2), ".", color=color, alpha=0.6)
    axes[0].set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes[0].set(xlabel=metric)
    if reference is not None:
        axes[1].axvline(0, color="0.4", linewidth=1)
        axes[1].set_yticks(range(len(arms)), [])
        axes[1].set(xlabel=f"{metric}, difference from {reference.name}")
    for axis in axes:
        axis.set_ylim(len(arms) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
    return figure


def _curves(arms: Sequence[Arm]) -> Any:
    figure, (axes,) = new_figure(3)
    for arm, color in zip(arms, COLORS * len(arms), strict=False):
        for number, run in enumerate(arm.runs):
            for axis, x in zip(axes, (run.curve.tokens, run.curve.flops, run.curve.hours), strict=True):
                label = arm.name if number == 0 else None
                begun = x > 0
                axis.plot(
                    x[begun], run.curve.losses[begun], color=color, marker=".", alpha=0.8, linewidth=1.2, label=label
                )
    for axis, name in zip(axes, ("tokens", "training FLOPs that were executed", "device hours of steps"), strict=True):
        axis.set(xlabel=name, ylabel="validation loss", xscale="log")
        axis.tick_params(axis="x", which="minor", labelsize=6)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    return figure


def _by_depth(arms: Sequence[Arm], metric: str) -> Any:
    figure, ((axis,),) = new_figure(1, width=7.5)
    for arm, color in zip(arms, COLORS * len(arms), strict=False):
        depths = arm.measured_depths
        if not depths:
            found = mean_of(arm, metric)
            axis.axhline(found.estimate, color=color, label=arm.name)
            axis.axhspan(found.low, found.high, color=color, alpha=0.08)
            continue
        intervals = [mean_of(arm, metric, depth) for depth in depths]
        axis.plot(depths, [each.estimate for each in intervals], marker="o", color=color, label=arm.name)
        by_seed = np.array([arm.values(metric, depth).mean(axis=1) for depth in depths])
        axis.plot(depths, by_seed, color=color, linewidth=0.8, alpha=0.6)
        low, high = [each.low for each in intervals], [each.high for each in intervals]
        axis.fill_between(depths, low, high, color=color, alpha=0.15)
        axis.axvline(arm.depth, color=color, linestyle="--", linewidth=1, alpha=0.6)
    axis.set(xlabel="loop steps at test time", ylabel=metric)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    return figure


def _loads(arms: Sequence[Arm]) -> dict[str, np.ndarray]:
    """Of each arm with experts, by the arm and its seed: their shares, (core layers, loop steps, experts)."""
    return {
        f"{arm.name}, seed {run.config.seed}": run.items["expert_load"]
        for arm in arms
        for run in [run for run in arm.runs if "expert_load" in run.items][:1]
    }


def _experts(loads: dict[str, np.ndarray]) -> Any:
    figure, axes = new_figure(max(map(len, loads.values())), rows=len(loads), height=2.8)
    for own, (name, load_LTE) in zip(axes, loads.items(), strict=True):
        for layer, axis in enumerate(own):
            if layer >= len(load_LTE):
                axis.set_axis_off()
                continue
            place = f", core layer {layer}" if len(load_LTE) > 1 else ""
            draw_load(figure, axis, load_LTE[layer], name + place)
    return figure


def _have_same_difficulties(arms: Sequence[Arm]) -> bool:
    """Whether all runs were evaluated on problems, and the problem in each place is equally difficult for all."""
    first, *others = (run.items for arm in arms for run in arm.runs)
    return "problems_difficulty" in first and all(
        np.array_equal(first[name], items.get(name, ()))
        for items in others
        for name in ("problems_difficulty", "problems_beyond")
    )


def _by_difficulty(arms: Sequence[Arm]) -> Any:
    figure, ((axis,),) = new_figure(1, width=6.4)
    items = arms[0].runs[0].items
    levels = np.unique(items["problems_difficulty"])
    trained = int(items["problems_difficulty"][~items["problems_beyond"]].max())
    for arm, color in zip(arms, COLORS * len(arms), strict=False):
        depths = arm.measured_depths
        for depth, style in ((arm.depth, "-"), *([(depths[-1], ":")] if depths else [])):
            solved = [each for run in arm.runs if (each := run.item("problems_solved", depth)) is not None]
            if not solved:
                continue
            together = np.mean(np.stack(solved), axis=0)
            shares = [together[items["problems_difficulty"] == level].mean() for level in levels]
            label = arm.name if style == "-" else None
            axis.plot(levels, shares, style, marker=".", color=color, label=label)
    axis.axvspan(trained + 0.5, levels[-1] + 0.5, color="0.9", zorder=0)
    axis.set(xlabel="difficulty", ylabel="share of problems that are solved", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure
