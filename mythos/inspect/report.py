"""The text of an inspection's report: what each picture shows, and what it says of this model."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from mythos.config.derive import whole_mean_depth
from mythos.config.schema import Config
from mythos.inspect.observe import HaltingTrace, Observation, RoutingTrace, StateTrace
from mythos.inspect.summary import cost_rows, costs, depth_law, mean_losses

IDLE = 0.1
"""An expert with less than this of an even share is called idle."""
NO_CHANGE = 1e-5
"""Of the state's size: what is left of it may be rounding."""


def report(title: str, measured: str, config: Config, observation: Observation, pictures: Sequence[str]) -> str:
    """The report as Markdown.

    Args:
        measured: on what and when.
        pictures: the names of those that were drawn.
    """
    texts = {
        "depth": _depth,
        "state": _state,
        "experts": lambda found: _experts(found.routing) if found.routing else "",
        "halting": lambda found: _halting(found.halting, found.trained_depth) if found.halting else "",
    }
    headings = {"depth": "Loss and depth", "state": "The loop's state", "experts": "Experts", "halting": "Halting"}
    parts = [f"# {title}", _summary(measured, observation)]
    for name in pictures:
        if name in texts:
            parts += [f"## {headings[name]}", f"![{headings[name]}]({name}.png)", texts[name](observation)]
    parts += ["## Cost", "\n".join(_table(config)), "\n".join(_attentions(config)), "![Cache](cache.png)"]
    return "\n\n".join(parts) + "\n"


def _summary(measured: str, observation: Observation) -> str:
    losses = mean_losses(observation)
    trained = list(observation.depths).index(observation.trained_depth)
    at = "" if observation.state is None else f" at {observation.trained_depth} loop steps, the mean depth of training"
    lines = [f"Measured on {measured}. The loss is **{losses[trained]:.4f}** nats per token{at}."]
    if observation.state is not None:
        lines.append("The dashed lines are at that depth. The numbers behind the pictures are in `figures.json`.")
    return " ".join(lines)


def _depth(observation: Observation) -> str:
    losses, depths = mean_losses(observation), observation.depths
    best = int(np.argmin(losses))
    trained = depths.index(observation.trained_depth)
    text = [
        f"One loop step gives {losses[0]:.4f}, the trained depth {losses[trained]:.4f}, {depths[-1]} loop steps "
        f"{losses[-1]:.4f}; the best depth measured is {depths[best]} with {losses[best]:.4f}."
    ]
    if law := depth_law(observation):
        error = float(np.abs(law.loss(np.array(depths)) - losses).max())
        text.append(f"The law L(T) = {law} (arXiv 2604.12946) is at most {error:.2g} away from the measurements.")
    text.append(
        "The other two pictures show by how much one more loop step lowers the loss: of tokens in five groups that "
        "make up a fifth of the text each, from the most frequent to the rarest, and of five parts of the row."
    )
    return " ".join(text)


def _state(observation: Observation) -> str:
    state, trained = observation.state, observation.trained_depth
    assert state is not None
    last = len(state.change)
    text = []
    if observation.decay_D is not None and observation.spectral_radius is not None:
        radius, middle = observation.spectral_radius, float(np.median(observation.decay_D))
        half = math.log(0.5) / math.log(radius) if 0 < radius < 1 else math.inf
        text.append(
            f"The injection keeps a = {middle:.3f} of a typical channel and {radius:.4f} of the slowest one, whose own "
            f"memory halves in {half:.1f} loop steps: the linear part of the loop is stable where a < 1."
        )
    elif observation.spectral_radius is not None:
        text.append(f"The spectral radius of the linear part of the loop is {observation.spectral_radius:.4f}.")
    trained = min(trained, last)
    text.append(
        f"In the last loop step of the trained depth the state changes by {state.change[trained - 1]:.2%} of its size. "
        f"It is then {state.distance[trained]:.2%} away from the state after loop step {last}, which changes it by "
        f"{state.change[-1]:.2%}: {_verdict(state, trained)}"
    )
    return " ".join(text)


def _verdict(state: StateTrace, trained: int) -> str:
    """Whether the changes fall by the trained depth, and still in the second half of all loop steps."""
    at_half = state.change[(len(state.change) - 1) // 2]
    at_end = state.change[-1]
    if at_end < max(0.5 * at_half, NO_CHANGE):
        return "it approaches a fixed point."
    if at_end < 0.5 * state.change[trained - 1]:
        return "it comes near a fixed point, but its changes no longer fall."
    return "it does not settle at a fixed point."


def _experts(routing: RoutingTrace) -> str:
    layers, steps, experts = routing.load_LTE.shape
    even = routing.load_LTE * experts
    idle = int((even.mean(axis=1) < IDLE).sum())
    neighbours = [routing.overlap_LTT[:, step, step + 1].mean() for step in range(steps - 1)]
    text = [
        f"Of {layers * experts} experts, {idle} get less than a tenth of an even share over all loop steps; the "
        f"largest load is {even.max():.2f} times even."
    ]
    if neighbours:
        text.append(
            f"From one loop step to the next a token keeps {np.mean(neighbours):.0%} of its experts, between the first "
            f"and the last {routing.overlap_LTT[:, 0, -1].mean():.0%}."
        )
    return " ".join(text)


def _halting(halting: HaltingTrace, trained: int) -> str:
    early = float((halting.step_N < trained).mean())
    return (
        f"{early:.1%} of the tokens halt before the trained depth of {trained}; the mean is loop step "
        f"{halting.step_N.mean():.2f}. The mean ponder cost at that depth is {halting.ponder_N.mean():.3f}."
    )


def _table(config: Config) -> Iterator[str]:
    yield "| | |"
    yield "|---|---:|"
    for name, value in cost_rows(config):
        yield f"| {name} | {value} |"


def _attentions(config: Config) -> Iterator[str]:
    depth = whole_mean_depth(config)
    at = "" if depth is None else f", with entries for each of {depth} loop steps"
    yield "The same model with other attentions, heads of the same size; the cache in bf16" + at + ":"
    yield ""
    yield "| attention | parameters | inference GFLOP a token | cache of a token, bytes |"
    yield "|---|---:|---:|---:|"
    for each in costs(config):
        yield f"| {each.name} | {each.parameters:,} | {each.inference_flops / 1e9:.4g} | {each.cache_bytes:,} |"
