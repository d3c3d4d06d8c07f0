"""What a rank works on at a step: its rows of the data and its part of the depth plan."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mythos.config.derive import global_batch_sequences, micro_steps, tokens_per_step
from mythos.config.schema import Config
from mythos.data.dataset import text_targets
from mythos.data.stream import AnswerTargets
from mythos.data.targets import counted_targets
from mythos.errors import UserError
from mythos.loss import IGNORED
from mythos.model import depth
from mythos.plan.flops import executed_steps, training_flops


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of the global batch of a step."""

    step: int
    """Number of the update, from 1."""
    rows: np.ndarray
    """Token ids, int64 of shape (micro-steps, micro batch, sequence_length + 1)."""
    plans: tuple[depth.DepthPlan | None, ...]
    """The depth plan of each micro-step; None for a dense model."""
    depths: np.ndarray
    """Loop steps of each sequence of the global batch, of all ranks."""
    answers: AnswerTargets | None
    """Which targets count; None: all."""
    text_tokens: int | None
    """Targets in ``rows`` that are text; None if the data does not say which ids are."""


def draw_depths(config: Config, step: int, first_sample: int) -> np.ndarray:
    """Loop steps of each sequence of the global batch, which begins at this sample; 1 each for a dense model."""
    sequences = global_batch_sequences(config)
    if config.loop is None:
        return np.ones(sequences, dtype=np.int64)
    return depth.draw_depths(config.loop, config.seed, step, range(first_sample, first_sample + sequences))


def model_flops(config: Config, depths: np.ndarray) -> float:
    """Model FLOPs of a step whose sequences ran the loop to these depths."""
    steps = executed_steps(depths, config.loop)
    return tokens_per_step(config) * training_flops(config.model, config.data.sequence_length, steps)


def own_sequences(config: Config, micro_step: int) -> tuple[slice, slice]:
    """The part of the global batch that is a micro-step, and the part of the micro-step that is this rank's."""
    own, ranks = config.train.micro_batch_sequences, dist.get_world_size()
    start = micro_step * own * ranks
    return slice(start, start + own * ranks), slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)


def own_samples(config: Config, first_sample: int, micro_step: int) -> range:
    """Numbers of the samples in this rank's micro batch; the step's first has the number ``first_sample``."""
    everyone, own = own_sequences(config, micro_step)
    first = first_sample + everyone.start + own.start
    return range(first, first + config.train.micro_batch_sequences)


def micro_batch_plan(config: Config, depths: np.ndarray, first_sample: int, micro_step: int) -> depth.DepthPlan | None:
    """This rank's part of the depth plan of a step that begins at this sample."""
    if config.loop is None:
        return None
    everyone, own = own_sequences(config, micro_step)
    seeds = [depth.state_seed(config.seed, sample) for sample in own_samples(config, first_sample, micro_step)]
    return depth.plan(depths[everyone], config.loop.backprop_depth, own, seeds)


class Samples(Protocol):
    """Numbered rows of tokens: a ``TokenStream``, or what stands for one where there are no data."""

    @property
    def special_ids(self) -> Sequence[int] | None: ...
    @property
    def answers(self) -> AnswerTargets | None: ...
    def rows(self, first_sample: int, count: int) -> np.ndarray: ...
    def epochs(self, samples: int) -> dict[str, float]: ...
    def close(self) -> None: ...


class StepBatches:
    """This rank's batches, step after step; the rows of the next step are read while this one runs.

    The position in the stream cannot be computed from the step: a run may have left out data, or changed its batch
    size. Close it when done.
    """

    def __init__(self, config: Config, stream: Samples, first_step: int, first_sample: int) -> None:
        self._config, self._stream = config, stream
        self._micro_steps = micro_steps(config, dist.get_world_size())
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[np.ndarray] | None = None
        self.waited_seconds = 0.0
        """How long training has waited for data since the last step began."""
        self.restart(first_step, first_sample)

    def restart(self, step: int, sample: int) -> None:
        """Continue at ``step``, with this sample of the stream."""
        self._step, self._sample, self._next = step, sample, None
        if step <= self._config.train.steps:
            pieces = [own_samples(self._config, sample, micro_step) for micro_step in range(self._micro_steps)]
            self._next = self._executor.submit(self._read, pieces)

    def check(self) -> None:
        """Wait for the next step's rows. Raises UserError when they cannot be read."""
        if self._next is not None:
            self._next.result()

    def failed(self) -> bool:
        """Wait for the next step's rows; whether ``check`` would raise."""
        with self._waiting():
            return self._next is not None and isinstance(self._next.exception(), UserError)

    def take(self) -> StepBatch:
        """The batch of the next step. Raises UserError when its rows cannot be read."""
        assert self._next is not None
        self.waited_seconds = 0.0
        with self._waiting():
            rows = self._next.result()
        step, sample = self._step, self._sample
        depths = draw_depths(self._config, step, sample)
        plans = tuple(
            micro_batch_plan(self._config, depths, sample, micro_step) for micro_step in range(self._micro_steps)
        )
        self.restart(step + 1, sample + global_batch_sequences(self._config))
        special_ids = self._stream.special_ids
        text_tokens = None if special_ids is None else text_targets(rows, special_ids)
        return StepBatch(step, rows, plans, depths, self._stream.answers, text_tokens)

    def epochs(self, sample: int) -> dict[str, float]:
        """How many epochs of each source were read before this sample."""
        return self._stream.epochs(sample)

    def close(self) -> None:
        """Stop reading."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._stream.close()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.waited_seconds += time.perf_counter() - start

    def _read(self, pieces: list[range]) -> np.ndarray:
        try:
            return np.stack([self._stream.rows(samples.start, len(samples)) for samples in pieces])
        except OSError as error:  # a UserError, so that all ranks learn of it before the next step
            raise UserError(f"the data cannot be read ({error}): repair the disk and start again") from error


class MicroBatch(NamedTuple):
    """Tokens and targets on their device, (B, S) each, and the number of targets that count."""

    tokens: Tensor
    targets: Tensor
    counted: int
    divisor: float | None
    """What the sum of their losses is divided by: the number that count in as many rows of the data on average.

    Not the number in these rows, or a target would weigh more in a micro batch with few of them, and the sum over micro
    batches and ranks would depend on how the rows are shared out. None: all targets count.
    """


def micro_batch(rows: np.ndarray, answers: AnswerTargets | None, device: torch.device) -> MicroBatch:
    """A micro batch of rows, (B, S + 1), in which only ``answers`` count."""
    targets = counted_targets(rows, answers.tokens if answers else None)
    divisor = len(rows) * answers.in_a_row if answers else None
    counted = int((targets != IGNORED).sum())
    return MicroBatch(_on_device(rows[:, :-1], device), _on_device(targets, device), counted, divisor)


def _on_device(ids: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(ids)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
