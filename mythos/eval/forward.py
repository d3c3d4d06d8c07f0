"""The forward pass of an evaluation: watched, interruptible, and with early exit from the loop."""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.config.schema import Eval
from mythos.model import CachedForward
from mythos.model.cache import Cache
from mythos.model.depth import DepthPlan
from mythos.model.loop import ExitRule
from mythos.ranks import group
from mythos.ranks.preemption import StopRequest
from mythos.ranks.watchdog import Watchdog

if TYPE_CHECKING:
    from mythos.engine.engine import TrainingEngine  # imports DeepSpeed


class Stopped(Exception):
    """A rank received a stop request, and all ranks have agreed to abandon the evaluation."""


def evaluation_forward(
    engine: "TrainingEngine", options: Eval, watchdog: Watchdog, activity: str, stop: StopRequest | None
) -> CachedForward:
    """A forward pass that reports its progress to the watchdog.

    Before each pass all ranks agree whether to stop; if so, it raises ``Stopped`` on all of them.

    Args:
        activity: what the run is doing, for the watchdog's report.
        stop: None if a stop cannot be requested.
    """
    rule = exit_rule(options)

    def forward(tokens: Tensor, targets: Tensor | None, plan: DepthPlan | None, cache: Cache | None = None) -> Any:
        watchdog.progress(activity)
        if stop is not None and group.on_any_rank(stop.asked, engine.device):
            raise Stopped
        return engine(tokens, targets, plan, rule, cache=cache)

    return forward


def exit_rule(options: Eval) -> ExitRule | None:
    """When a sequence needs no more loop steps, None for the planned depth; agreed by all ranks, which share experts.

    ``exit_change``: ||h_{t+1} - h_t|| < exit_change * ||h_{t+1}|| over its tokens; works for any model.
    ``exit_when_halted``: the halting weights of all its tokens are used up (adaptive computation time).
    """
    if options.exit_change is None and not options.exit_when_halted:
        return None

    def leave(before_BSD: Tensor, after_BSD: Tensor, halted_BS: Tensor | None) -> Tensor:
        done_B = torch.zeros(len(after_BSD), dtype=torch.bool, device=after_BSD.device)
        if options.exit_change is not None:
            change_B, size_B = ((h.float().flatten(1).norm(dim=1)) for h in (after_BSD - before_BSD, after_BSD))
            done_B = done_B | (change_B < options.exit_change * size_B)
        if options.exit_when_halted and halted_BS is not None:
            done_B = done_B | halted_BS.all(dim=1)
        agreed_B = done_B.int()
        if dist.is_initialized():  # every rank has equally many sequences
            dist.all_reduce(agreed_B, op=dist.ReduceOp.MIN)
        return agreed_B.bool()

    return leave
