"""An upper bound of the share of the peak: the step's own products and attention, with all other work free.

python -m benchmarks.product_bound MODEL.yaml RUN.yaml key=value ...
python -m benchmarks.product_bound WIDTH                                   # the model of benchmarks.plain_experts

Every product and attention of one training step is run again by itself, on the same tensors, and its best time is
taken: narrow products do not reach the rate of large square ones. Arguments as for benchmarks.share_of_peak.
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.plain_experts import DEPTH, LENGTH, SEQUENCES, VOCABULARY, configuration
from benchmarks.share_of_peak import training_steps
from launch.train import run_ranks
from mythos.config.arguments import split_arguments
from mythos.config.load import load_without_data
from mythos.config.schema import Config
from mythos.errors import DONE
from mythos.model import build_model
from mythos.plan.flops import LoopSteps, training_flops

REPEATS = 8
SIZE = 512
"""Of the square matrices whose product is the peak."""
aten = torch.ops.aten
IN_PLACE = {aten.addmm_.default: (1, 3), aten.mm.out: (0, 2)}
"""Run again as a plain product of these arguments."""
PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._grouped_mm.default}
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}


def best_seconds(function: Any, args: Any, kwargs: Any) -> float:
    """Processor time of one call, the best of several: other programs can only make it longer."""
    seconds = []
    for _ in range(REPEATS):
        started = time.process_time()
        function(*args, **kwargs)
        seconds.append(time.process_time() - started)
    return min(seconds)


class Products(TorchDispatchMode):
    """Within it, every product and attention is timed when its shapes are seen first, and the peak beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Any] = Counter()
        self.peak_flops: dict[Any, float] = {}
        self._square = torch.randn(SIZE, SIZE)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS or func in ATTENTION or func in IN_PLACE:
            key = (func, *((a.shape, a.stride()) if isinstance(a, Tensor) else a for a in args))
            self.calls[key] += 1
            if key not in self.peak_flops:
                again = func
                if func in IN_PLACE:
                    first, end = IN_PLACE[func]
                    args, kwargs, again = args[first:end], None, aten.mm.default
                self.peak_flops[key] = best_seconds(again, args, kwargs or {}) * self._peak()
        return result

    def total(self, of: set[Any]) -> float:
        """What large square products would have done in the time of all calls of these functions, FLOP."""
        return sum(calls * self.peak_flops[key] for key, calls in self.calls.items() if key[0] in of)

    def _peak(self) -> float:
        """FLOP/s at this moment, so that other programs slow down both alike."""
        return 2 * SIZE**3 / best_seconds(torch.mm, (self._square, self._square), {})


def report(step: Callable[[], float]) -> None:
    """``step`` returns its model FLOPs."""
    step()
    with Products() as products:
        flops = step()
    matrices, attention = products.total(PRODUCTS | set(IN_PLACE)), products.total(ATTENTION)
    print(f"attention takes {attention / (matrices + attention):.0%} of the time of both")
    print(f"upper bound of the share of the peak: {flops / (matrices + attention):.3f}", flush=True)


def of_training(config: Config, device: torch.device) -> int:
    """The bound for training under the engine."""
    with training_steps(config, device) as step:
        report(step)
    return DONE


def of_plain_experts(width: int) -> int:
    """The bound for the plain model with latent attention."""
    config = configuration(width)
    model, tokens = build_model(config), torch.randint(VOCABULARY, (SEQUENCES, LENGTH))

    def step() -> float:
        model(tokens, tokens, DEPTH).total.backward()
        model.zero_grad()
        return SEQUENCES * LENGTH * training_flops(config.model, LENGTH, LoopSteps(0, DEPTH))

    report(step)
    return DONE


def main() -> int:
    if sys.argv[1].isdecimal():
        return of_plain_experts(int(sys.argv[1]))
    files, overrides = split_arguments(sys.argv[1:])
    return run_ranks(lambda world_size: load_without_data(files, overrides, world_size, 2), of_training)


if __name__ == "__main__":
    sys.exit(main())
