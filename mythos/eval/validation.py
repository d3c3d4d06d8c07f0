"""Loss on held-out documents, at each depth."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist

from mythos.config.schema import Eval
from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source
from mythos.engine.engine import TrainingEngine
from mythos.eval.batches import validation_batches
from mythos.eval.forward import Stopped, evaluation_forward
from mythos.model import Forward, depth
from mythos.ranks import group
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog
from mythos.run.console import log


def validate(
    engine: TrainingEngine,
    sources: Sequence[Source],
    options: Eval,
    depths: Sequence[int],
    micro_batch: int,
    step: int,
    watchdog: Watchdog,
    stop: StopRequest | None = None,
) -> dict[str, float] | None:
    """Measure and log the validation loss of the engine's weights at each depth. Collective.

    Returns:
        The losses by metric; None if a stop was requested meanwhile and all ranks have abandoned the validation.
    """
    forward = evaluation_forward(engine, options, watchdog, f"validation after step {step}", stop)
    for source in sources:
        group.agree(partial(source.dataset.check, options.sequences))
    try:
        with engine.evaluation():
            losses = validation_losses(forward, sources, depths, options.sequences, micro_batch, engine.device)
    except Stopped:
        return None
    log.info(f"step {step} " + " ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return losses


def validation_losses(
    forward: Forward,
    sources: Sequence[Source],
    depths: Sequence[int],
    sequences: int,
    micro_batch: int,
    device: torch.device,
) -> dict[str, float]:
    """Mean loss per token over the first ``sequences`` of every source, the same on any number of ranks. Collective.

    One value for each of ``depths`` (``val/loss_depth_T``), or ``val/loss`` for a model without a loop. Of several
    sources this is the mean by weight, the loss of the mixture, and each has its own: ``val/NAME/loss_depth_T``.
    """
    by_source = [_losses(forward, source.dataset, depths, sequences, micro_batch, device) for source in sources]
    weights = torch.tensor([source.weight for source in sources], dtype=torch.float64)
    mean = (weights / weights.sum()) @ torch.tensor(by_source, dtype=torch.float64)
    names = [f"loss_depth_{steps}" for steps in depths] or ["loss"]
    found = {f"val/{name}": loss for name, loss in zip(names, mean.tolist(), strict=True)}
    if len(sources) > 1:
        for source, losses in zip(sources, by_source, strict=True):
            found |= {f"val/{source.name}/{name}": loss for name, loss in zip(names, losses, strict=True)}
    return found


def _losses(
    forward: Forward,
    dataset: TokenDataset,
    depths: Sequence[int],
    sequences: int,
    micro_batch: int,
    device: torch.device,
) -> list[float]:
    """The loss on one data set, one value for each depth."""
    totals = torch.zeros((len(depths) or 1) + 1, dtype=torch.float64, device=device)
    for first, tokens, targets, count in validation_batches(dataset, min(sequences, len(dataset)), micro_batch, device):
        # The initial state of a row comes from its number, so that it is the same on any number of ranks.
        for i, steps in enumerate(depths or (None,)):
            plan = None if steps is None else depth.fixed(steps, micro_batch, first_seed=first)
            loss, _ = forward(tokens, targets, plan)
            totals[i] += loss.double() * count
        totals[-1] += count
    dist.all_reduce(totals)
    return (totals[:-1] / totals[-1]).tolist()
