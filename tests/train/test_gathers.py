"""ZeRO-3 gathers the loop's weights once forward and once backward, whatever the number of loop steps."""

from pathlib import Path
from typing import Any

import deepspeed.comm.comm as backend
import numpy as np
import pytest
import torch

from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.model import build_model
from mythos.model.depth import plan
from mythos.plan.schedule import schedule
from tests.spawn import RankPool
from tests.tiny import SEQUENCE_LENGTH, VOCABULARY, tiny_config


def gathered_bytes(config: Config, depths: list[int]) -> list[int]:
    """Bytes received by all-gathers in each training step, one step per depth; half of the loop has no gradient."""
    engine = TrainingEngine(config, torch.device("cpu"))
    counted, original = [0], backend.cdb.all_gather_into_tensor

    def counting(*positional: Any, **named: Any) -> Any:
        output = named.get("output_tensor", positional[0] if positional else None)
        counted[0] += output.numel() * output.element_size()
        return original(*positional, **named)

    backend.cdb.all_gather_into_tensor = counting
    try:
        totals = []
        for depth in depths:
            counted[0] = 0
            tokens = torch.randint(VOCABULARY, (4, SEQUENCE_LENGTH))
            own = plan(np.full(8, depth), max(1, depth // 2), slice(0, 4), range(4))
            engine.backward(engine(tokens, tokens, own).total)
            engine.step(schedule(config.optim, 0, config.train.steps))
            totals.append(counted[0])
        return totals
    finally:
        backend.cdb.all_gather_into_tensor = original


def parameter_bytes(config: Config) -> int:
    return sum(parameter.numel() * 4 for parameter in build_model(config).parameters())


@pytest.mark.parametrize(("model", "expert_parallel_size"), [("looped", None), ("looped-moe", 1), ("mythos", 2)])
def test_gathered_bytes_do_not_depend_on_the_number_of_loops(
    model: str, expert_parallel_size: int | None, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config(model, tiny_data, tmp_path, ranks=2, parallel__expert_parallel_size=expert_parallel_size)
    few = two_ranks.run(gathered_bytes, config, [2] * 5)
    many = two_ranks.run(gathered_bytes, config, [16] * 5)
    changing = two_ranks.run(gathered_bytes, config, [2, 16, 5, 11, 3, 16, 2])
    assert few[0][0] == many[0][0]
    assert few[0][2:] == many[0][2:], "16 loops gather as much as 2"
    assert set(changing[0][2:]) == set(few[0][2:]), "whatever the depth of the previous step"
    # Once forward and once backward at most; the tied token table for the embedding and again for the head.
    table_bytes = VOCABULARY * config.model.width * 4
    assert 0 < max(many[0]) <= 2 * (parameter_bytes(config) + table_bytes)
