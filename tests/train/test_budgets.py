"""A run with several budgets has at each the weights of a run of its own; so has one that is extended or paused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mythos.checkpoint import layout
from mythos.config.schema import Config
from mythos.errors import DONE, PREEMPTED
from mythos.parity.scaling_runs import read_points
from mythos.run.describe import describe
from mythos.run.directory import RunDirectory
from mythos.run.metrics import read_metrics
from mythos.run.status import read_status
from tests.spawn import RankPool
from tests.tiny import tiny_config
from tests.train.runs import run_some_steps, run_training

Make = Callable[..., Config]
BUDGETS = {6: 6, 8: 11, 12: 19}
"""Steps of the run at which each is reached."""


@pytest.fixture(scope="module")
def make(tiny_data: Path) -> Make:
    def config(run: Path, steps: int = 12, **options: Any) -> Config:
        options = {"checkpoint__every": 1000, "checkpoint__keep_last": 1, "optim__warmup_steps": 2} | options
        return tiny_config("looped", tiny_data, run, ranks=2, train__steps=steps, **options)

    return config


@pytest.fixture(scope="module")
def alone(make: Make, two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run for each budget."""
    runs = {steps: tmp_path_factory.mktemp("alone") / str(steps) for steps in BUDGETS}
    for steps, run in runs.items():
        assert two_ranks.run(run_training, make(run, steps)) == [DONE, DONE]
    return runs


def content(run: Path, step: int) -> list[bytes]:
    """Weights and optimizer state of a checkpoint."""
    checkpoint = RunDirectory(run).checkpoints / layout.tag(step)
    return [path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))]


def values(run: Path, name: str) -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(run) if name in line}


def steps_of(run: Path) -> list[int]:
    return [layout.step_of(path) for path in reversed(layout.complete_checkpoints(RunDirectory(run).checkpoints))]


@pytest.mark.parametrize("stops", [(), (5,), (6, 1), (8, 4, 2)])
def test_the_model_of_each_budget_is_that_of_a_run_of_its_own(
    stops: tuple[int, ...], make: Make, alone: dict[int, Path], two_ranks: RankPool, tmp_path: Path
) -> None:
    """Uninterrupted, and stopped in a decay, at its end, and in the constant phase."""
    run = tmp_path / "run"
    config = make(run, train__budgets=[6, 8])
    for steps in stops:
        assert two_ranks.run(run_some_steps, config, steps) == [PREEMPTED, PREEMPTED]
    assert two_ranks.run(run_training, config) == [DONE, DONE]
    for budget, step in BUDGETS.items():
        assert content(run, step) == content(alone[budget], budget)
        assert values(run, "val/loss")[step] == values(alone[budget], "val/loss")[budget]
        assert values(run, "train/tokens")[step] == values(alone[budget], "train/tokens")[budget]
    points = {point.updates: point for point in (each.end for each in read_points([run], "total").points)}
    for budget, other in alone.items():
        (own,) = (each.end for each in read_points([other], "total").points)
        assert (points[budget].tokens, points[budget].loss) == (own.tokens, own.loss)
        assert points[budget].flops == pytest.approx(own.flops, rel=1e-6)
    assert len(points) == len(alone)
    assert steps_of(run) == [3, 6, 7, 11, 13, 19], "before and after each decay, although only one is kept otherwise"
    losses, of_longest = values(run, "train/loss"), values(alone[12], "train/loss")
    assert list(losses) == list(range(1, 20))
    constant_phase = [1, 2, 3, 7, 12, 13]
    assert [losses[step] for step in constant_phase] == [of_longest[step] for step in range(1, 7)]
    assert values(run, "train/updates") == {step: step - 3 for step in range(7, 12)} | {s: s - 7 for s in range(12, 20)}
    assert list(values(run, "train/budget")) == [11, 19]
    status = read_status(run)
    assert (status.state, status.step, status.steps) == ("finished", 19, 19)


def test_a_run_that_is_extended_continues_before_its_decay(
    make: Make, alone: dict[int, Path], two_ranks: RankPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert two_ranks.run(run_training, make(run, 6)) == [DONE, DONE]
    assert steps_of(run) == [3, 6]
    assert two_ranks.run(run_training, make(run, 12)) == [DONE, DONE], "no question: the rate goes on as before"
    assert content(run, 15) == content(alone[12], 12)
    assert steps_of(run) == [3, 6, 9, 15]
    assert "back to the constant phase, to step_00000003" in (run / "log/rank_00000.log").read_text(encoding="utf-8")


def test_a_pause(make: Make, alone: dict[int, Path], two_ranks: RankPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in range(2):
        assert two_ranks.run(run_training, make(run, 8, train__stop_at=5)) == [DONE, DONE]
        assert list(values(run, "val/loss")) == [0, 5]
        status = read_status(run)
        assert (status.state, status.step, status.steps) == ("paused", 5, 8)
        assert describe(status)["state"].startswith("paused after 5 steps (train.stop_at): raise train.stop_at")
    assert two_ranks.run(run_training, make(run, 8)) == [DONE, DONE]
    assert content(run, 8) == content(alone[8], 8)
    assert read_status(run).state == "finished"
