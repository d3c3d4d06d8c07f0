"""What a rank works on at a step: its rows of the data and its part of the depth plan."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mythos.config.derive import global_batch_sequences, micro_steps
from mythos.config.schema import Config
from mythos.data.stream import TokenStream
from mythos.errors import UserError
from mythos.model import depth


def draw_depths(config: Config, step: int) -> np.ndarray:
    """Loop steps of each sequence of the global batch at this step; 1 each for a dense model."""
    sequences = global_batch_sequences(config)
    if config.loop is None:
        return np.ones(sequences, dtype=np.int64)
    return depth.draw_depths(config.loop, config.seed, step, sequences)


def own_sequences(config: Config, micro_step: int) -> tuple[slice, slice]:
    """Where a micro-step lies in the global batch, and where this rank's micro batch lies in the micro-step."""
    own, ranks = config.train.micro_batch_sequences, dist.get_world_size()
    start = micro_step * own * ranks
    return slice(start, start + own * ranks), slice(dist.get_rank() * own, (dist.get_rank() + 1) * own)


def own_samples(config: Config, first_of_step: int, micro_step: int) -> range:
    """Numbers of the samples in this rank's micro batch, where the step's first has that number."""
    everyone, own = own_sequences(config, micro_step)
    first = first_of_step + everyone.start + own.start
    return range(first, first + config.train.micro_batch_sequences)


def micro_batch_plan(config: Config, depths: np.ndarray, step: int, micro_step: int) -> depth.DepthPlan | None:
    """This rank's part of the depth plan."""
    if config.loop is None:
        return None
    everyone, own = own_sequences(config, micro_step)
    samples = own_samples(config, (step - 1) * global_batch_sequences(config), micro_step)
    seeds = [depth.state_seed(config.seed, sample) for sample in samples]
    return depth.plan(depths[everyone], config.loop.backprop_depth, own, seeds)


class StepBatches:
    """This rank's rows of one step after the other, each step's read in the background while the one before runs.

    The position in the stream is not tied to the step's number: a run may have left out data, or changed its batch.
    Close it when done.
    """

    def __init__(self, config: Config, stream: TokenStream, first_step: int, first_sample: int) -> None:
        self._config, self._stream = config, stream
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: Future[np.ndarray] | None = None
        self.restart(first_step, first_sample)

    def restart(self, step: int, sample: int) -> None:
        """Go on at ``step``, with this sample of the stream."""
        self._step, self._sample, self._next = step, sample, None
        if step <= self._config.train.steps:
            pieces = [
                own_samples(self._config, sample, micro_step)
                for micro_step in range(micro_steps(self._config, dist.get_world_size()))
            ]
            self._next = self._executor.submit(self._read, pieces)

    def check(self) -> None:
        """Wait for the next step's rows. Raises UserError when they cannot be had."""
        if self._next is not None:
            self._next.result()

    def failed(self) -> bool:
        """Wait for the next step's rows; whether ``check`` would raise."""
        return self._next is not None and isinstance(self._next.exception(), UserError)

    def take(self, step: int) -> np.ndarray:
        """The rows of a step, int64 of shape (micro-steps, micro batch, sequence_length + 1). Steps in their order."""
        assert self._next is not None
        assert self._step == step
        rows = self._next.result()
        self.restart(step + 1, self._sample + global_batch_sequences(self._config))
        return rows

    def close(self) -> None:
        """Let go of the data."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._stream.close()

    def _read(self, pieces: list[range]) -> np.ndarray:
        try:
            return np.stack([self._stream.rows(samples.start, len(samples)) for samples in pieces])
        except OSError as error:  # in a form that all ranks hear of before they step on
            raise UserError(f"the data cannot be read ({error}): mend the disk and start again") from error


def tokens_and_targets(rows: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """A micro batch on its device, (B, S) each."""
    tensor = torch.from_numpy(rows)
    if device.type == "cuda":
        tensor = tensor.pin_memory().to(device, non_blocking=True)
    return tensor[:, :-1], tensor[:, 1:]
