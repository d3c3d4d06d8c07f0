"""The speed of training: steps of the real engine on synthetic tokens."""

import gc
import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from mythos.bench.timeline import Observer, Part, Timeline
from mythos.config.derive import tokens_per_step
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.plan.flops import TrainingFlops, executed_steps, training_flops_by_part
from mythos.plan.schedule import schedule
from mythos.ranks import group
from mythos.train.batch import StepBatches
from mythos.train.step import balance_experts, exchange, train_step


@dataclass(frozen=True)
class Speed:
    """What was measured of one configuration; the same on every rank."""

    step_seconds: tuple[float, ...]
    """Of each measured step, on the slowest rank."""
    tokens: int
    """Of each step, over all ranks."""
    flops: TrainingFlops
    """Model FLOPs a token, with the depths of the measured steps."""
    processor_seconds: float
    """Processor time of a mean step, mean over ranks: unlike the time of a step, other processes hardly change it."""
    part_seconds: dict[Part, float]
    """Of a mean step, mean over ranks."""
    peak_flops_per_second: float
    """Of matrix products in the training type, on all ranks together."""
    peak_memory_gib: float
    """Of the rank that used most: on a GPU for this configuration, on a CPU in the process so far."""

    @property
    def tokens_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens * len(self.step_seconds) / sum(self.step_seconds)

    @property
    def model_flops_per_second(self) -> float:
        """Over all ranks."""
        return self.tokens_per_second * self.flops.total

    @property
    def share_of_peak(self) -> float:
        """Model FLOP/s over the peak."""
        return self.model_flops_per_second / self.peak_flops_per_second

    def part_share_of_peak(self, part: Part) -> float | None:
        """The same of one part of the model, in its own time; None for what is not part of the model."""
        flops = {
            Part.PRELUDE: self.flops.prelude,
            Part.LOOP: self.flops.loop,
            Part.CODA: self.flops.coda,
            Part.HEAD: self.flops.head,
        }.get(part)
        seconds = self.part_seconds[part]
        return self.tokens * flops / seconds / self.peak_flops_per_second if flops and seconds else None


class SyntheticTokens:
    """Random rows in the place of a ``TokenStream``; each is a function of the seed and its sample's number."""

    special_ids: None = None
    answers: None = None

    def __init__(self, config: Config) -> None:
        self._seed, self._vocabulary = config.seed, config.model.vocabulary_size
        self._length = config.data.sequence_length + 1

    def rows(self, first_sample: int, count: int) -> np.ndarray:
        """Token ids, int64 of shape (count, sequence_length + 1)."""
        generators = (np.random.default_rng((self._seed, first_sample + row)) for row in range(count))
        return np.stack([generator.integers(self._vocabulary, size=self._length) for generator in generators])

    def epochs(self, samples: int) -> dict[str, float]:
        """There are no sources."""
        return {}

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class NeverAsked:
    """In the place of a ``StopRequest`` and of a ``Saver``: no signal is awaited, nothing is saved."""

    asked: bool = False
    pending: bool = False


def measure_speed(config: Config, device: torch.device, warmup: int, peak: float) -> Speed:
    """Train ``train.steps`` steps, each as `mythos train` does it. Collective.

    Args:
        warmup: the first steps, which are not measured.
        peak: FLOP/s of matrix products on all ranks together.

    Raises:
        UserError: an update was skipped, because the gradient was not finite: the time of its parts means nothing.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine = TrainingEngine(config, device)
    nobody = NeverAsked()
    seconds, processor, parts, depths, memory = [], [], [], [], 0.0
    with closing(StepBatches(config, SyntheticTokens(config), 1, 0)) as batches, Observer(engine, batches) as observer:
        for step in range(config.train.steps):
            dist.barrier()
            observer.timeline = Timeline(device)
            started, processor_started = time.perf_counter(), time.process_time()
            batch = batches.take()
            result = train_step(engine, batch, schedule(config.optim, step, config.train.steps))
            votes = exchange(result, nobody, batches, nobody, device)
            balance_experts(engine, config.model, result, votes)
            part_seconds = observer.timeline.seconds()
            if step >= warmup:
                seconds.append(time.perf_counter() - started)
                processor.append(time.process_time() - processor_started)
                parts.append(list(part_seconds.values()))
                depths.append(batch.depths)
            if not result.applied:
                raise UserError(
                    f"optim.learning_rate = {config.optim.learning_rate:g}: the gradient of step {step + 1} is not "
                    "finite on random tokens: lower it",
                    agreed=True,
                )
            memory = votes.peak_memory_gib
    engine.close()
    del engine, observer, batches
    _free_memory(device)
    numbers = torch.tensor([*seconds, np.mean(processor), *np.mean(parts, axis=0)], dtype=torch.float64, device=device)
    of_ranks, steps = group.gather(numbers), len(seconds)
    return Speed(
        tuple(of_ranks[:, :steps].amax(dim=0).tolist()),
        tokens_per_step(config),
        training_flops_by_part(
            config.model, config.data.sequence_length, executed_steps(np.concatenate(depths), config.loop)
        ),
        float(of_ranks[:, steps].mean()),
        dict(zip(Part, of_ranks[:, steps + 1 :].mean(dim=0).tolist(), strict=True)),
        peak,
        memory,
    )


def _free_memory(device: torch.device) -> None:
    """Give back the memory of an engine, whose modules and hooks refer to each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
