"""The pictures of an inspection, drawn from an observation."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from mythos.drawing import draw_load, loop_step_ticks, new_figure
from mythos.inspect.observe import HaltingTrace, Observation, RoutingTrace, StateTrace
from mythos.inspect.summary import Cost, Gains, depth_law, mean_losses, ponder_groups

TRAINED = {"color": "0.5", "linestyle": "--", "linewidth": 1}


def pictures(observation: Observation, gains: Sequence[Gains], costs: Sequence[Cost]) -> Iterator[tuple[str, Figure]]:
    """Each with its name; those that the model has no parts for are left out."""
    if observation.state is not None:
        yield "depth", _depth(observation, gains)
        yield "state", _state(observation, observation.state)
    if observation.routing is not None:
        yield "experts", _experts(observation.routing, observation.trained_depth)
    if observation.halting is not None:
        yield "halting", _halting(observation.halting, observation.trained_depth)
    yield "cache", _cache(costs)


def _depth(observation: Observation, gains: Sequence[Gains]) -> Figure:
    figure, ((of_loss, *of_gains),) = new_figure(1 + len(gains))
    depths = np.array(observation.depths)
    of_loss.plot(depths, mean_losses(observation), "o", label="measured")
    if law := depth_law(observation):
        smooth = np.linspace(depths[0], depths[-1], 200)
        of_loss.plot(smooth, law.loss(smooth), label=str(law))
    _mark_trained(of_loss, observation.trained_depth)
    of_loss.set(xlabel="loop steps T", ylabel="nats per token", title="Loss")
    of_loss.legend()
    for axis, each, title in zip(of_gains, gains, ("by the target's frequency", "by position"), strict=True):
        per_step_TG = each.gain_TG / np.diff(depths)[:, None]
        colors = colormaps["viridis"](np.linspace(0, 0.9, len(each.names)))
        for name, gain_T, color in zip(each.names, per_step_TG.T, colors, strict=True):
            axis.plot(depths[1:], gain_T, marker=".", color=color, label=name)
        axis.axhline(0, color="0.8", linewidth=1, zorder=0)
        axis.set_yscale("symlog", linthresh=1e-3)
        _mark_trained(axis, observation.trained_depth)
        axis.set(xlabel="loop step", ylabel="nats per token", title=f"Gain of a loop step, {title}")
        axis.legend(fontsize="small")
    return figure


def _state(observation: Observation, state: StateTrace) -> Figure:
    figure, ((of_decay, of_norm), (of_change, of_distance)) = new_figure(2, 2)
    if observation.decay_D is None:
        of_decay.text(0.5, 0.5, "the injection has no decay by channel", ha="center", va="center")
        of_decay.set_axis_off()
    else:
        of_decay.hist(observation.decay_D, bins=40, range=(0, 1))
        largest = observation.decay_D.max()
        of_decay.axvline(largest, color="tab:red", label=f"largest {largest:.4f}")
        of_decay.set(xlabel="a: share of the state that a loop step keeps", ylabel="channels", title="Injection")
        of_decay.legend()
    steps = np.arange(len(state.norm))
    for axis, x, values, label in (
        (of_norm, steps, state.norm, "|h|, root mean square over tokens"),
        (of_change, steps[1:], state.change, "|h$_t$ - h$_{t-1}$| / |h$_t$|"),
        (of_distance, steps[:-1], state.distance[:-1], f"|h$_t$ - h$_{{{steps[-1]}}}$| / |h$_{{{steps[-1]}}}$|"),
    ):
        axis.plot(x, values, marker=".")
        _mark_trained(axis, observation.trained_depth)
        axis.set(xlabel="loop step t", ylabel=label)
    for axis in (of_change, of_distance):
        axis.set_yscale("log")
    of_norm.set(title="Size of the state", ylim=(0, None))
    of_change.set(title="Change in a loop step")
    of_distance.set(title=f"Distance to the state after {steps[-1]} loop steps")
    return figure


def _experts(routing: RoutingTrace, trained: int) -> Figure:
    layers, steps, experts = routing.load_LTE.shape
    figure, axes = new_figure(3, layers)
    for layer, (of_load, of_overlap, of_entropy) in enumerate(axes):
        name = f", core layer {layer}" if layers > 1 else ""
        draw_load(figure, of_load, routing.load_LTE[layer], f"Load{name}")
        image = of_overlap.imshow(routing.overlap_LTT[layer], vmin=0, vmax=1, cmap="magma")
        figure.colorbar(image, ax=of_overlap, label="share")
        of_overlap.set(xlabel="loop step", ylabel="loop step", title=f"Experts in common{name}")
        ticks = loop_step_ticks(steps)
        of_overlap.set_xticks(ticks, ticks + 1)
        of_overlap.set_yticks(ticks, ticks + 1)
        of_entropy.plot(np.arange(1, steps + 1), routing.entropy_LT[layer], marker=".")
        of_entropy.axhline(np.log(experts), color="tab:red", linewidth=1, label=f"ln {experts}: undecided")
        _mark_trained(of_entropy, trained)
        of_entropy.set(xlabel="loop step", ylabel="nats", title=f"Entropy of the router{name}")
        of_entropy.set_ylim(0, 1.05 * np.log(experts))
        of_entropy.xaxis.set_major_locator(MaxNLocator(integer=True))
        of_entropy.legend()
    return figure


def _halting(halting: HaltingTrace, trained: int) -> Figure:
    figure, ((of_steps, of_ponder),) = new_figure(2, width=5.4)
    steps, tokens = np.unique(halting.step_N, return_counts=True)
    of_steps.bar(steps, tokens / tokens.sum())
    _mark_trained(of_steps, trained)
    of_steps.set(xlabel="loop step", ylabel="share of tokens", title="Where tokens halt")
    groups = ponder_groups(halting)
    of_ponder.errorbar(groups.ponder, groups.loss, groups.standard_error, fmt="o", color="tab:blue")
    of_ponder.set(xlabel="ponder cost, loop steps (tenths of the tokens)", ylabel="nats per token")
    of_ponder.set(title="Loss of tokens by their ponder cost")
    return figure


def _cache(costs: Sequence[Cost]) -> Figure:
    figure, ((axis,),) = new_figure(1, width=7.5, height=0.7 + 0.42 * len(costs))
    sizes = [each.cache_bytes for each in costs]
    colors = ["tab:blue", *["0.7"] * (len(costs) - 1)]
    bars = axis.barh(range(len(costs)), sizes, color=colors)
    axis.bar_label(bars, [f"{size:,}" for size in sizes], padding=3)
    axis.set_yticks(range(len(costs)), [each.name for each in costs])
    axis.invert_yaxis()
    axis.set(xlabel="bytes of a token in bf16", title="Cache", xlim=(0, 1.15 * max(sizes)))
    return figure


def _mark_trained(axis: Any, trained: int) -> None:
    """A line at the mean depth of training, which the legend does not name: the report's text does."""
    axis.axvline(trained, **TRAINED)
