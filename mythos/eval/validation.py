"""Loss on held-out documents, at each depth.

    loss(row) = mean over its tokens      val/loss = mean over the rows      its standard error = s / sqrt(rows)

where s is the standard deviation of the rows' losses.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mythos.config.derive import eval_depths, whole_mean_depth
from mythos.config.model_schema import Looped
from mythos.config.schema import Config
from mythos.data.stream import Source
from mythos.engine.engine import TrainingEngine
from mythos.eval.batches import validation_batches, validation_rows
from mythos.eval.forward import Stopped, evaluation_forward
from mythos.eval.routing import ExpertLoad
from mythos.model import Forward, LoopedTransformer, depth
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import Notices, log

ERROR = "loss_standard_error"


@dataclass(frozen=True)
class Validation:
    """The losses by metric. ``load_LTE``: the experts' shares of the tokens' choices, of each core layer at each loop
    step of the mean depth, over all rows; None without experts."""

    losses: dict[str, float]
    load_LTE: np.ndarray | None = None


def validate(
    engine: TrainingEngine,
    sources: Sequence[Source],
    config: Config,
    step: int,
    watchdog: Watchdog,
    stop: StopRequest | None = None,
) -> Validation | None:
    """Measure and log the validation losses of the engine's weights. Collective.

    Returns:
        What was measured; None if a stop was requested meanwhile and all ranks have abandoned the validation.

    Raises:
        UserError: a rank cannot read its rows.
    """
    forward = evaluation_forward(engine, config.eval, watchdog, f"validation after step {step}", stop)
    load = _expert_load(engine, config)
    try:
        with engine.evaluation():
            losses = validation_losses(
                forward,
                sources,
                eval_depths(config),
                whole_mean_depth(config),
                config.eval.sequences,
                config.train.micro_batch_sequences,
                engine.device,
                load,
            )
            load_LTE = load.shares_LTE().numpy() if load else None
    except Stopped:
        return None
    log.info(f"step {step} " + " ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return Validation(losses, load_LTE)


def _expert_load(engine: TrainingEngine, config: Config) -> ExpertLoad | None:
    """To be counted at the mean depth; None without experts, or where sequences may leave the loop early."""
    model, mean_depth = config.model, whole_mean_depth(config)
    leaves = config.eval.exit_change is not None or config.eval.exit_when_halted
    if not isinstance(model, Looped) or model.core_experts is None or mean_depth is None or leaves:
        return None
    looped = engine.module
    assert isinstance(looped, LoopedTransformer)
    return ExpertLoad(looped.loop.core, mean_depth, model.core_experts.experts, engine.device)


def validation_losses(
    forward: Forward,
    sources: Sequence[Source],
    depths: Sequence[int],
    mean_depth: int | None,
    sequences: int | None,
    micro_batch: int,
    device: torch.device,
    load: ExpertLoad | None = None,
) -> dict[str, float]:
    """Mean loss per token over ``sequences`` rows of every source, None for all; the same on all ranks. Collective.

    ``val/loss`` is at the mean depth (None for a dense model) and has a standard error; each of ``depths`` has its
    ``val/loss_depth_T``. Of several sources these are the means by weight, the loss of the mixture, and each source has
    its own: ``val/NAME/loss`` and so on.
    """
    steps_of = {"loss": mean_depth} | {f"loss_depth_{steps}": steps for steps in depths}
    measured = [
        _summary(_losses(forward, each, steps_of, sequences, micro_batch, device, load), steps_of) for each in sources
    ]
    weights = math.fsum(source.weight for source in sources)
    shares = [source.weight / weights for source in sources]
    found = {
        f"val/{name}": math.fsum(share * each[name] for share, each in zip(shares, measured, strict=True))
        for name in steps_of
    }
    if all(ERROR in each for each in measured):
        found[f"val/{ERROR}"] = math.hypot(*(share * each[ERROR] for share, each in zip(shares, measured, strict=True)))
    if len(sources) > 1:
        for source, losses in zip(sources, measured, strict=True):
            found |= {f"val/{source.name}/{name}": loss for name, loss in losses.items()}
    return found


def _summary(losses: Mapping[int | None, Sequence[float]], steps_of: Mapping[str, int | None]) -> dict[str, float]:
    """The means over the rows by name, and the standard error of ``loss`` if there are several rows."""
    found = {name: _mean(losses[steps]) for name, steps in steps_of.items()}
    rows, mean = losses[steps_of["loss"]], found["loss"]
    if len(rows) > 1:
        found[ERROR] = math.sqrt(_mean([(loss - mean) ** 2 for loss in rows]) / (len(rows) - 1))
    return found


def _mean(values: Sequence[float]) -> float:
    """Rounded once, so that it does not depend on the order of additions."""
    return math.fsum(values) / len(values)


def _losses(
    forward: Forward,
    source: Source,
    steps_of: Mapping[str, int | None],
    sequences: int | None,
    micro_batch: int,
    device: torch.device,
    load: ExpertLoad | None,
) -> dict[int | None, list[float]]:
    """The losses of all rows, in order, by depth; the same on all ranks."""
    rows, depths = validation_rows(source.dataset, sequences), list(dict.fromkeys(steps_of.values()))
    losses_TR = torch.zeros(len(depths), len(rows), dtype=torch.float64, device=device)
    notices = Notices(f"validation on {source.name}", len(rows), "sequences")
    at_once = micro_batch * dist.get_world_size()
    batches = validation_batches(source.dataset, rows, micro_batch, device)
    for number, (place, numbers, tokens, targets) in enumerate(batches):
        notices.report(number * at_once)
        for steps, losses_R in zip(depths, losses_TR, strict=True):
            # The initial state of a row comes from its number, so that it does not depend on the set or the ranks.
            plan = None if steps is None else depth.fixed(steps, micro_batch, numbers.tolist())
            own_B = losses_R[place]
            with load.counted(len(own_B)) if load is not None and steps == load.depth else nullcontext():
                losses_B = forward(tokens, targets, plan).by_sequence_B
            own_B.copy_(losses_B[: len(own_B)])
    dist.all_reduce(losses_TR)  # each element is zero on all ranks but one, so nothing is rounded
    return dict(zip(depths, losses_TR.tolist(), strict=True))
