"""When to leave the loop early, in evaluation: agreed by all ranks, since they share the experts."""

import torch
import torch.distributed as dist
from torch import Tensor

from mythos.config.schema import Eval
from mythos.model.loop import ExitRule


def exit_rule(config: Eval) -> ExitRule | None:
    """The rule that the configuration asks for, None for the planned depth.

    ``exit_change``: ||h_{t+1} - h_t|| < exit_change * ||h_{t+1}|| over all tokens, without training for it.
    ``exit_when_halted``: every token's halting weights are spent (adaptive computation time).
    """
    if config.exit_change is None and not config.exit_when_halted:
        return None

    def leave(before_BSD: Tensor, after_BSD: Tensor, halted_BS: Tensor | None) -> bool:
        done = torch.zeros((), dtype=torch.bool, device=after_BSD.device)
        if config.exit_change is not None:
            change = (after_BSD - before_BSD).float().norm()
            done = done | (change < config.exit_change * after_BSD.float().norm())
        if config.exit_when_halted and halted_BS is not None:
            done = done | halted_BS.all()
        agreed = done.int()
        if dist.is_initialized():
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed)

    return leave
