"""The dense parts of a model as compiled functions: blocks and injection; where experts follow, attention, norms, the
shared expert and, on a CPU, what is elementwise between the routed experts' products and after them.

Not compiled: the loop itself, routing and the routed experts' products, which are Python around them, tables and loss.

Every function is compiled twice, with and without gradient, whatever the number of sequences: the loop's steps differ
in it. A batch without sequences, and new tokens with a cache, are computed as written.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor, nn

from mythos.model.block import Block, CoreBlock
from mythos.model.cache import LayerCache
from mythos.model.injection import LTIInjection
from mythos.model.layers import SwiGLU
from mythos.model.moe import Gated, RoutedSum

LARGEST_MODEL = 1024
"""Of the functions of one class, as many are compiled: two for each module."""


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Replace the functions, after DeepSpeed has replaced modules. Parameters keep their names."""
    # Otherwise one sequence would be compiled apart, because sizes 0 and 1 are taken for constants.
    torch.fx.experimental._config.backed_size_oblivious = True  # type: ignore[attr-defined]
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LARGEST_MODEL)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, LARGEST_MODEL
    )
    for module in model.modules():
        if isinstance(module, CoreBlock) and module.expert_config is not None:
            module.attend = _compiled(module.attend, backend)  # type: ignore[method-assign]
            for part in module.feed_forward.modules():
                if isinstance(part, SwiGLU):
                    part.forward = _compiled(part.forward, backend)  # type: ignore[method-assign]
                if isinstance(part, Gated):
                    part.gated = _compiled(part.gated, backend)  # type: ignore[method-assign]
                if isinstance(part, RoutedSum):
                    part.weighted_sum = _compiled(part.weighted_sum, backend)  # type: ignore[method-assign]
        elif isinstance(module, Block | LTIInjection):
            module.forward = _compiled(module.forward, backend)  # type: ignore[method-assign]


def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """``function``, whose tensors have sequences, tokens or rows as their first dimension, compiled for any number."""
    compiled = torch.compile(function, fullgraph=True, backend=backend)

    def call(first_B: Tensor, *rest: Any) -> Any:
        if not len(first_B) or any(isinstance(argument, LayerCache) for argument in rest):
            return function(first_B, *rest)
        for argument in (first_B, *rest):
            if isinstance(argument, Tensor):
                torch._dynamo.mark_dynamic(argument, 0)
        return compiled(first_B, *rest)

    return call
