"""How often a step makes the host wait for its GPU, apart from AutoEP's own exchange of tokens."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.model.depth import plan
from mythos.plan.schedule import schedule
from mythos.train.batch import StepBatch
from mythos.train.step import train_step
from tests.spawn import RankPool
from tests.synchronisations import count_synchronisations
from tests.tiny import SEQUENCE_LENGTH, VOCABULARY, tiny_config

MICRO_STEPS = 4


def synchronisations_of_a_step(config: Config, mean_depths: list[int]) -> list[Counter[str]]:
    engine = TrainingEngine(config, torch.device("cpu"))
    found, generator = [], np.random.default_rng(0)
    for mean_depth in mean_depths:
        depths = generator.poisson(mean_depth, (MICRO_STEPS, 8)).clip(1)
        rows = generator.integers(VOCABULARY, size=(MICRO_STEPS, 8, SEQUENCE_LENGTH + 1))
        plans = tuple(plan(own, 2, slice(0, 8), range(8)) for own in depths)
        batch = StepBatch(step=1, rows=rows, answers=None, text_tokens=None, plans=plans, depths=depths)
        with count_synchronisations() as counted:
            train_step(engine, batch, schedule(config.optim, 0, config.train.steps))
        found.append(counted)
    return found


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_step_waits_a_few_times_a_micro_step_whatever_the_depth(
    zero_stage: int, one_rank: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(
        "published",
        tiny_data,
        tmp_path,
        train__global_batch_sequences=8 * MICRO_STEPS,
        train__micro_batch_sequences=8,
        parallel__zero_stage=zero_stage,
    )
    (found,) = one_rank.run(synchronisations_of_a_step, config, [2, 3, 9, 30])
    assert 0 < found[-1].total() <= 10 * MICRO_STEPS, found[-1]
    assert found[-1].total() <= found[1].total(), "the loop itself never waits"


def test_what_waits_is_counted() -> None:
    numbers = torch.arange(4.0)
    with count_synchronisations() as counted:
        float(numbers.sum())
        numbers.tolist()
        numbers[numbers > 1]
        torch.tensor([1.0])
        numbers[torch.arange(2)]
    assert counted == {"_local_scalar_dense": 1, "tolist": 1, "index": 1, "lift_fresh": 1}
