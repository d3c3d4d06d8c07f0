"""The forward pass of an evaluation: watched, interruptible, and with early exit from the loop."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.config.schema import Eval
from mythos.engine.engine import TrainingEngine
from mythos.model import Forward
from mythos.model.depth import DepthPlan
from mythos.model.loop import ExitRule
from mythos.ranks import group
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog


class Stopped(Exception):
    """A rank received a stop request, and all ranks have agreed to abandon the evaluation."""


def evaluation_forward(
    engine: TrainingEngine, options: Eval, watchdog: Watchdog, activity: str, stop: StopRequest | None
) -> Forward:
    """A forward pass that reports its progress to the watchdog.

    Before each pass all ranks agree whether to stop; if so, it raises ``Stopped`` on all of them.

    Args:
        activity: what the run is doing, for the watchdog's report.
        stop: None if a stop cannot be requested.
    """
    rule = exit_rule(options)

    def forward(tokens: Tensor, targets: Tensor | None, plan: DepthPlan | None) -> Any:
        watchdog.progress(activity)
        if stop is not None and group.on_any_rank(stop.asked, engine.device):
            raise Stopped
        return engine(tokens, targets, plan, rule)

    return forward


def exit_rule(options: Eval) -> ExitRule | None:
    """When to leave the loop early, None for the planned depth; agreed by all ranks, since they share the experts.

    ``exit_change``: ||h_{t+1} - h_t|| < exit_change * ||h_{t+1}|| over all tokens; works for any model.
    ``exit_when_halted``: the halting weights of every token are used up (adaptive computation time).
    """
    if options.exit_change is None and not options.exit_when_halted:
        return None

    def leave(before_BSD: Tensor, after_BSD: Tensor, halted_BS: Tensor | None) -> bool:
        done = torch.zeros((), dtype=torch.bool, device=after_BSD.device)
        if options.exit_change is not None:
            change = (after_BSD - before_BSD).float().norm()
            done = done | (change < options.exit_change * after_BSD.float().norm())
        if options.exit_when_halted and halted_BS is not None:
            done = done | halted_BS.all()
        agreed = done.int()
        if dist.is_initialized():
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed)

    return leave
