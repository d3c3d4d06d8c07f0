"""Steps with a non-finite loss or gradient: all ranks skip and count them, and too many in a row end the run."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mythos.checkpoint import layout
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import TrainingError
from mythos.run.metrics import read_metrics
from tests.reference.plain_training import train_plainly
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import curve, run_training

STEPS = 12


def train_with_a_fault(config: Config, place: str, steps: list[int]) -> str:
    """Train while rank 1 alone gets a NaN loss, or an infinite gradient in one parameter; returns the outcome."""
    plain_call, plain_backward, calls = TrainingEngine.__call__, TrainingEngine.backward, []

    def faulty() -> bool:
        return len(calls) in steps and dist.get_rank() == 1

    def call(self: TrainingEngine, *arguments: Any, **options: Any) -> Any:
        output = plain_call(self, *arguments, **options)
        if torch.is_grad_enabled():
            calls.append(None)
            if place == "loss" and faulty():
                output = output._replace(total=output.total * math.nan, cross_entropy=output.cross_entropy * math.nan)
        return output

    def backward(self: TrainingEngine, loss: torch.Tensor) -> None:
        if place == "loss" or not faulty():
            return plain_backward(self, loss)
        parameter = dict(self.module.named_parameters())[place]
        hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        plain_backward(self, loss)
        hook.remove()
        return None

    TrainingEngine.__call__, TrainingEngine.backward = call, backward  # type: ignore[method-assign]
    try:
        return str(run_training(config))
    except TrainingError as error:
        return str(error)
    finally:
        TrainingEngine.__call__, TrainingEngine.backward = plain_call, plain_backward  # type: ignore[method-assign]


EXPERT = "loop.core.0.feed_forward.experts.w2"


@pytest.mark.parametrize("place", ["loss", EXPERT, "embedding.weight"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_step_on_one_rank_is_skipped_by_all(
    place: str, stage: int, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"parallel__zero_stage": stage, "parallel__expert_parallel_size": 2}
    config = tiny_config("looped-moe", tiny_data, tmp_path / "run", ranks=2, train__steps=STEPS, **options)
    assert two_ranks.run(train_with_a_fault, config, place, [4, 5]) == ["0", "0"]

    expected = train_plainly(config, STEPS, skipped=frozenset({4, 5}))
    losses = curve(config, "train/loss")
    if place == "loss":
        assert losses[3:5] == [None, None]
        losses[3:5] = [loss for loss, _ in expected[3:5]]
    assert losses == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert curve(config, "train/gradient_norm")[3:5] == [None, None]
    assert curve(config, "train/skipped_steps") == [0, 0, 0, 1] + [2] * (STEPS - 4)


def test_too_many_bad_steps_end_the_run_with_the_last_checkpoint_intact(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"parallel__expert_parallel_size": 2, "checkpoint__every": 5, "train__max_bad_steps": 3}
    options |= {"optim__cooldown_fraction": 1 / 6}  # so that the checkpoint before it is a later one
    config = tiny_config("looped-moe", tiny_data, tmp_path / "run", ranks=2, train__steps=STEPS, **options)
    messages = two_ranks.run(train_with_a_fault, config, "loss", list(range(7, 100)))
    assert messages[0] == messages[1]
    assert "not finite at 3 steps in a row (train.max_bad_steps), up to step 9" in messages[0]
    assert "step_00000005" in messages[0]
    assert read_metrics(tmp_path / "run")[-1]["step"] == 9
    assert layout.latest(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step_00000005"

    assert two_ranks.run(run_training, config) == [0, 0]
    expected = train_plainly(config, STEPS)
    assert curve(config, "train/loss") == pytest.approx([loss for loss, _ in expected], rel=1e-5)
