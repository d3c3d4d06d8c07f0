"""`mythos bench`: the machine, then one setting, or two in turn."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mythos.bench.peaks import SIZES, Peaks, Sizes, measure_peaks, name_of
from mythos.bench.speed import Speed, measure_speed
from mythos.config.schema import Config
from mythos.engine.sections import training_dtype
from mythos.run.console import log

ALWAYS = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}
"""Types of matrix products that are measured whatever is trained. On some virtual CPUs products in bf16 end the process
by SIGILL, so there they are measured only where training uses them."""


@dataclass(frozen=True)
class Measurement:
    """All that was measured; the same on every rank."""

    peaks: Peaks
    peak_dtype: torch.dtype
    """The training type of the first setting; of no setting, the first one that was measured."""
    rounds: tuple[tuple[Speed, ...], ...]
    """The speeds of all settings, round by round; one round for a single setting, none for the machine alone."""


def measure(
    settings: Sequence[Config],
    device: torch.device,
    warmup: int,
    rounds: int,
    sizes: Sizes | None = None,
) -> Measurement:
    """Measure the machine, and each of the settings (none, one or two) in each round. Collective.

    Args:
        warmup: steps of each setting in each round that are not measured.
        rounds: of two settings.
    """
    of_settings = [training_dtype(config, device) for config in settings]
    dtypes = list(dict.fromkeys([*of_settings, *ALWAYS[device.type]]))
    log.info(f"measuring matrix products in {', '.join(map(name_of, dtypes))}, copies and collectives")
    peaks = measure_peaks(device, dtypes, sizes or SIZES[device.type])
    done = []
    for number in range(1, 1 + (rounds if len(settings) > 1 else min(1, len(settings)))):
        speeds = []
        for name, config, dtype in zip("AB", settings, of_settings, strict=False):
            log.info(f"round {number}, setting {name}: {config.train.steps} steps")
            speeds.append(measure_speed(config, device, warmup, peaks.matmul_flops_per_second(dtype)))
        done.append(tuple(speeds))
    return Measurement(peaks, dtypes[0], tuple(done))
