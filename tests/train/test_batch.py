"""The batches of a run: the rows of each rank, read ahead of their step."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mythos.config.schema import Config
from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source, TokenStream
from mythos.errors import UserError
from mythos.train.batch import StepBatches
from tests.data.conftest import SEQUENCE_LENGTH, open_run_data
from tests.spawn import RankPool
from tests.tiny import tiny_config


def rows_of_steps(config: Config, first_step: int, steps: int) -> np.ndarray:
    """The rows of this rank: (steps, micro-steps, micro batch, tokens)."""
    batches = StepBatches(config, open_run_data(config).stream(), first_step, (first_step - 1) * 8)
    taken = [batches.take() for _ in range(steps)]
    batches.close()
    for batch in taken:
        targets = batch.rows[..., 1:]
        assert batch.text_tokens == targets.size - (targets == 0).sum() - (targets == 1).sum()
    return np.stack([batch.rows for batch in taken])


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_two_ranks_together_get_the_rows_of_one_rank(
    micro_batch: int, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("dense", tiny_data, tmp_path, ranks=2, train__micro_batch_sequences=micro_batch)
    by_rank = two_ranks.run(rows_of_steps, config, 12, 5)
    # (steps, micro-steps, ranks, micro batch, tokens): the global batch in its order
    found = np.stack(by_rank, axis=2).reshape(5 * 8, SEQUENCE_LENGTH + 1)
    stream = TokenStream([Source("data", 1.0, TokenDataset(tiny_data, "train"))], 42, config.data.shuffle_shards)
    np.testing.assert_array_equal(found, stream.rows(11 * 8, 5 * 8))


def depths_and_seeds(config: Config, batch: int, first: tuple[int, int], then: tuple[int, int]) -> dict[int, Any]:
    """Depth and seed of each sample: of one step from (step, sample), and of one with another batch from ``then``."""
    found: dict[int, Any] = {}
    for size, (step, sample) in ((8, first), (batch, then)):
        train = replace(config.train, global_batch_sequences=size, micro_batch_sequences=4)
        batches = StepBatches(replace(config, train=train), open_run_data(config).stream(), step, sample)
        own = [plan for plan in batches.take().plans if plan is not None]
        batches.close()
        depths = [sum(steps) for plan in own for steps in zip(plan.without_grad, plan.with_grad, strict=True)]
        seeds = [seed for plan in own for seed in plan.state_seeds]
        found |= {sample + i: each for i, each in enumerate(zip(depths, seeds, strict=True))}
    return found


def test_depth_and_state_of_a_sequence_follow_its_place_in_the_data(
    one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("looped", tiny_data, tmp_path)
    [straight] = one_rank.run(depths_and_seeds, config, 8, (5, 32), (6, 40))
    assert len({seed for _, seed in straight.values()}) == 16
    [rewound] = one_rank.run(depths_and_seeds, config, 8, (5, 32), (5, 40))
    assert rewound == straight, "a step that is repeated after a rewind, with the next samples"
    [larger] = one_rank.run(depths_and_seeds, config, 16, (5, 32), (3, 32))
    assert larger == straight, "another size of the batch"


class SlowStream:
    """A stream whose reads wait for a gate."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.gate = threading.Semaphore(0)
        self.error: Exception | None = None
        self.special_ids = self.answers = None

    def rows(self, first_sample: int, count: int) -> np.ndarray:
        self.gate.acquire()
        self.asked.append(first_sample)
        if self.error is not None:
            raise self.error
        return np.full((count, 3), first_sample)

    def close(self) -> None:
        self.gate.release(100)


def test_the_next_step_is_read_during_this_one_and_its_error_is_raised_in_the_caller(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mythos.train.batch.dist.get_rank", lambda: 0)
    monkeypatch.setattr("mythos.train.batch.dist.get_world_size", lambda: 1)
    stream = SlowStream()
    batches = StepBatches(tiny_config("dense", tiny_data, tmp_path, train__steps=3), stream, 1, 0)  # type: ignore[arg-type]
    stream.gate.release()
    assert batches.take().rows.shape == (1, 8, 3)
    stream.gate.release()  # step 2 has not been taken yet
    until = time.monotonic() + 30
    while stream.asked != [0, 8]:
        assert time.monotonic() < until
        time.sleep(0.01)
    batches.take()
    stream.error = UserError("shard 7 is damaged")
    stream.gate.release()
    assert batches.failed()
    with pytest.raises(UserError, match="shard 7"):
        batches.check()
    with pytest.raises(UserError, match="shard 7"):
        batches.take()
    batches.close()


def test_nothing_is_read_after_the_last_step(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mythos.train.batch.dist.get_rank", lambda: 0)
    monkeypatch.setattr("mythos.train.batch.dist.get_world_size", lambda: 1)
    stream = SlowStream()
    batches = StepBatches(tiny_config("dense", tiny_data, tmp_path, train__steps=3), stream, 3, 16)  # type: ignore[arg-type]
    stream.gate.release(5)
    batches.take()
    assert not batches.failed()
    batches.check()
    assert stream.asked == [16]
    batches.close()
