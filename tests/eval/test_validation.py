"""The validation loss is the plain mean over the first sequences, however they are spread over ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mythos.data.dataset import TokenDataset
from mythos.data.stream import Source
from mythos.eval.forward import exit_rule
from mythos.eval.validation import validation_losses
from mythos.model import build_model, depth
from tests.model.helpers import randomise
from tests.spawn import RankPool
from tests.tiny import tiny_config

CPU = torch.device("cpu")


def measure(kind: str, data: Path, sequences: int, micro_batch: int) -> dict[str, float]:
    model = randomise(build_model(tiny_config(kind, data, data)), deviation=0.1).eval()
    depths = () if kind == "dense" else (1, 3)
    with torch.no_grad():
        forward = model if depths else lambda tokens, targets, plan: model(tokens, targets)
        sources = [Source("data", 1.0, TokenDataset(data, "validation"))]
        return validation_losses(forward, sources, depths, sequences, micro_batch, CPU)


@pytest.mark.parametrize(("sequences", "micro_batch"), [(7, 2), (5, 4), (1, 4), (100, 3)])
def test_it_equals_one_sequence_after_the_other(
    sequences: int, micro_batch: int, one_rank: RankPool, two_ranks: RankPool, tiny_data: Path
) -> None:
    model = randomise(build_model(tiny_config("looped-moe", tiny_data, tiny_data)), deviation=0.1).eval()
    dataset = TokenDataset(tiny_data, "validation")
    rows = [torch.from_numpy(dataset[i])[None] for i in range(min(sequences, len(dataset)))]
    expected = {}
    with torch.no_grad():
        for steps in (1, 3):
            losses = [model(row[:, :-1], row[:, 1:], depth.fixed(steps, 1, i))[0].item() for i, row in enumerate(rows)]
            expected[f"val/loss_depth_{steps}"] = pytest.approx(sum(losses) / len(losses), rel=1e-5)
    for pool in (one_rank, two_ranks):
        for found in pool.run(measure, "looped-moe", tiny_data, sequences, micro_batch):
            assert found == expected


def test_a_dense_model_has_one_loss(two_ranks: RankPool, tiny_data: Path) -> None:
    found = two_ranks.run(measure, "dense", tiny_data, 7, 2)
    assert found[0] == found[1]
    assert list(found[0]) == ["val/loss"]


def steps_taken(data: Path, options: dict[str, Any]) -> list[int]:
    """How many loop steps a validation pass takes on this rank; rank 1's state settles later than rank 0's."""
    overrides = {f"eval__{name}": value for name, value in options.items()}
    config = tiny_config("mythos", data, data, **overrides)
    model = randomise(build_model(config), deviation=0.05).eval()
    rule, steps = exit_rule(config.eval), []
    slow = 3 * dist.get_rank()

    def late(before: torch.Tensor, after: torch.Tensor, halted: torch.Tensor) -> bool:
        steps.append(None)
        if len(steps) <= slow:  # this rank alone is not done
            return rule(before, after + 1e6, torch.zeros_like(halted))
        return rule(before, after, halted)

    tokens = torch.arange(30).view(2, 15)
    with torch.no_grad():
        model(tokens, None, depth.fixed(40, 2), late)
    return len(steps)


@pytest.mark.parametrize("options", [{"exit_change": 0.05}, {"exit_when_halted": True}])
def test_all_ranks_leave_the_loop_at_the_same_step(
    options: dict[str, Any], two_ranks: RankPool, tiny_data: Path
) -> None:
    first, second = two_ranks.run(steps_taken, tiny_data, options)
    assert first == second
    assert 3 < first < 40
