"""The share of the matrix-product peak that training reaches, on a machine that other programs use as well.

python -m benchmarks.share_of_peak MODEL.yaml RUN.yaml key=value ...

`mythos bench` measures the peak once, before training, and the time that passes. Here the peak is measured before and
after every step, both in processor time, so that other programs slow down both alike. Takes the model, run and options
of `mythos bench`; one process with one thread.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch

from launch.train import run_ranks
from mythos.bench.speed import SyntheticTokens
from mythos.config.arguments import split_arguments
from mythos.config.load import load_without_data
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import DONE
from mythos.plan.schedule import schedule
from mythos.train.batch import StepBatches, model_flops
from mythos.train.step import train_step

WARMUP, STEPS = 1, 6
PRODUCTS = {512: 80, 1024: 10}
"""Products of square matrices by their size: about a quarter of a second each."""


def peak() -> float:
    """FLOP/s of fp32 products at this moment: the best of the sizes."""
    rates = []
    for size, products in PRODUCTS.items():
        left, right = torch.randn(size, size), torch.randn(size, size)
        result = left @ right
        started = time.process_time()
        for _ in range(products):
            torch.mm(left, right, out=result)
        rates.append(products * 2 * size**3 / (time.process_time() - started))
    return max(rates)


def share_of_peak(step: Callable[[], float]) -> str:
    """Medians of time, FLOP/s and share of the peak of a step, which returns its model FLOPs."""
    for _ in range(WARMUP):
        step()
    shares, rates, seconds, before = [], [], [], peak()
    for _ in range(STEPS):
        started = time.process_time()
        flops = step()
        seconds.append(time.process_time() - started)
        after = peak()
        rates.append(flops / seconds[-1])
        shares.append(rates[-1] / ((before + after) / 2))
        before = after
    return (
        f"{statistics.median(seconds):.3f} s a step, {statistics.median(rates) / 1e9:.1f} GFLOP/s, share of the peak "
        f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"
    )


@contextmanager
def training_steps(config: Config, device: torch.device) -> Iterator[Callable[[], float]]:
    """A function that does one step of training under the engine and returns its model FLOPs."""
    engine = TrainingEngine(config, device)
    with closing(StepBatches(config, SyntheticTokens(config), 1, 0)) as batches:

        def step() -> float:
            batch = batches.take()
            train_step(engine, batch, schedule(config.optim, 0, config.train.steps))
            return model_flops(config, batch.depths)

        yield step


def measure(config: Config, device: torch.device) -> int:
    """Measure training under the engine."""
    with training_steps(config, device) as step:
        print(share_of_peak(step), flush=True)
    return DONE


def main() -> int:
    files, overrides = split_arguments(sys.argv[1:])
    return run_ranks(lambda world_size: load_without_data(files, overrides, world_size, WARMUP + STEPS), measure)


if __name__ == "__main__":
    sys.exit(main())
