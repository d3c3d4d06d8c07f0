"""A resumed run gives the same numbers as an uninterrupted one, to the last bit."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mythos.checkpoint import layout
from mythos.checkpoint.manifest import weights_file
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.plan.flops import executed_steps, training_flops
from mythos.run.directory import PARTIAL_SUFFIX, STATE_FILE, RunDirectory
from mythos.run.metrics import read_metrics
from mythos.train.batch import draw_depths
from tests.data.conftest import write_data_set
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import curve, run_training

EXACT = ("train/loss", "train/gradient_norm", "loop/state_norm", "moe/load_max_over_mean", "val/loss_depth_3")
STEPS, SAVED = 12, 6
MOE: dict[str, Any] = {"checkpoint__every": SAVED, "eval__every": 3, "parallel__expert_parallel_size": 2}


def as_if_killed_after(config: Config, step: int, directory: Path) -> Config:
    """A copy of the run in the state in which a kill three steps after the checkpoint leaves it."""
    source = Path(config.run.directory)
    shutil.copytree(source, directory)
    run = RunDirectory(directory)
    run.latest.write_text(layout.tag(step), encoding="utf-8")
    shutil.rmtree(run.checkpoints / layout.tag(config.train.steps))
    lines = run.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step + 3]
    run.metrics.write_text("".join(kept) + '{"step": 10, "train/lo', encoding="utf-8")
    run.config.write_text(run.config.read_text(encoding="utf-8").replace(str(source), str(directory)), encoding="utf-8")
    return replace(config, run=replace(config.run, directory=str(directory)))


@pytest.mark.parametrize(
    ("model", "overrides"),
    [
        ("looped-moe", MOE | {"parallel__zero_stage": 3}),
        ("looped-moe", MOE | {"parallel__zero_stage": 3, "parallel__expert_parallel_size": 1}),
        ("looped-moe", MOE | {"parallel__zero_stage": 2, "train__micro_batch_sequences": 2}),
        ("looped-moe", MOE | {"parallel__zero_stage": 1}),
        ("looped-moe", MOE | {"parallel__zero_stage": 0}),
        ("mythos", MOE),
        ("looped-moe", MOE | {"precision": "bf16"}),
        ("published", {"checkpoint__every": SAVED}),
        ("dense", {"checkpoint__every": SAVED, "parallel__zero_stage": 0}),
    ],
)
def test_resumed_equals_uninterrupted_to_the_last_bit(
    model: str, overrides: dict[str, Any], two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    straight = tiny_config(model, tiny_data, tmp_path / "straight", ranks=2, train__steps=STEPS, **overrides)
    assert two_ranks.run(run_training, straight) == [0, 0]
    resumed = as_if_killed_after(straight, SAVED, tmp_path / "resumed")
    assert two_ranks.run(run_training, resumed) == [0, 0]
    for name in EXACT:
        assert curve(resumed, name) == curve(straight, name), name
    steps = [line["step"] for line in read_metrics(Path(resumed.run.directory)) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1)), "no step is missing or doubled"


def test_tensorboard_shows_one_curve_under_the_names_of_metrics_jsonl(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    straight = tiny_config("looped-moe", tiny_data, tmp_path / "straight", ranks=2, train__steps=STEPS, **MOE)
    assert two_ranks.run(run_training, straight) == [0, 0]
    resumed = as_if_killed_after(straight, SAVED, tmp_path / "resumed")
    assert two_ranks.run(run_training, resumed) == [0, 0]
    events = EventAccumulator(str(tmp_path / "resumed"), {"images": 0})  # all of them
    events.Reload()
    lines = read_metrics(tmp_path / "resumed")
    names = {name for line in lines for name in line} - {"step"}
    planned = {"plan/step_seconds", "plan/peak_memory_gib"}
    assert names | planned == set(events.Tags()["scalars"])
    for name in names:
        points = [(point.step, pytest.approx(point.value, rel=1e-6)) for point in events.Scalars(name)]
        assert points == [(line["step"], line[name]) for line in lines if name in line], name
    assert "config/text_summary" in events.Tags()["tensors"]
    assert set(events.Tags()["images"]) == {"val/expert_load"}
    assert [picture.step for picture in events.Images("val/expert_load")] == [0, 3, 6, 9, 12]


def test_losses_by_tokens_are_one_curve_and_flops_are_those_executed(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options = MOE | {"log__every": 4, "train__steps": STEPS}
    straight = tiny_config("looped-moe", tiny_data, tmp_path / "straight", ranks=2, **options)
    assert two_ranks.run(run_training, straight) == [0, 0]
    resumed = as_if_killed_after(straight, SAVED, tmp_path / "resumed")
    assert two_ranks.run(run_training, resumed) == [0, 0]
    flops = {0: 0.0}
    for step in range(1, STEPS + 1):
        executed = executed_steps(draw_depths(straight, step, 8 * (step - 1)), straight.loop)
        flops[step] = flops[step - 1] + 8 * 15 * training_flops(straight.model, 15, executed)
    lines = read_metrics(tmp_path / "resumed")
    logged = {line["step"]: line["train/flops"] for line in lines if "train/flops" in line}
    assert logged == {step: pytest.approx(flops[step]) for step in (4, 8, 12)}
    events = EventAccumulator(str(tmp_path / "resumed" / "by_tokens"))
    events.Reload()
    for name in ("train/loss", "val/loss"):
        points = events.Scalars(f"by_tokens/{name.replace('/', '_')}")
        expected = [(8 * 15 * line["step"], pytest.approx(line[name])) for line in lines if name in line]
        assert [(point.step, point.value) for point in points] == expected


def test_old_checkpoints_are_removed_and_the_state_is_stored(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options = MOE | {"checkpoint__every": 3, "checkpoint__keep_last": 2}
    config = tiny_config("looped-moe", tiny_data, tmp_path / "run", ranks=2, train__steps=10, **options)
    two_ranks.run(run_training, config)
    run = RunDirectory(tmp_path / "run")
    assert sorted(path.name for path in run.checkpoints.glob("step_*")) == [f"step_{n:08d}" for n in (5, 9, 10)]
    assert run.latest.read_text(encoding="utf-8") == "step_00000010"
    state = json.loads((run.checkpoints / "step_00000010" / STATE_FILE).read_text(encoding="utf-8"))
    assert (state["step"], state["samples"], state["data"]["seed"]) == (10, 80, 42)
    assert state["world"] == {"ranks": 2, "zero_stage": 3, "expert_parallel_size": 2, "precision": "fp32"}
    assert state["tokens"] == 80 * 15


def test_a_start_without_a_checkpoint_begins_again_without_doubled_steps(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("looped-moe", tiny_data, tmp_path / "run", ranks=2, train__steps=3, **MOE)
    two_ranks.run(run_training, config)
    shutil.rmtree(RunDirectory(tmp_path / "run").checkpoints)
    assert two_ranks.run(run_training, config) == [0, 0]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "val/loss_depth_3" in line] == [0, 3]


def test_an_interrupted_save_is_set_aside(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, train__steps=6, checkpoint__every=3)
    two_ranks.run(run_training, tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, train__steps=1))
    directory = RunDirectory(tmp_path / "run").checkpoints
    partial = directory / f"{layout.tag(2)}{PARTIAL_SUFFIX}"
    partial.mkdir()
    (partial / weights_file(0)).write_bytes(b"half")
    assert two_ranks.run(run_training, config) == [0, 0]
    assert sorted(path.name for path in directory.glob("step_*")) == ["step_00000003", "step_00000006"]
    assert (directory / layout.SET_ASIDE / partial.name / weights_file(0)).read_bytes() == b"half"


def global_generators() -> list[Any]:
    return [torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()]  # type: ignore[index]


def states_after_each_step(config: Config) -> list[Any]:
    seen, step = [], TrainingEngine.step

    def watched(*arguments: Any) -> Any:
        update = step(*arguments)
        seen.append(global_generators())
        return update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingEngine, "step", watched)
        run_training(config)
    return seen


@pytest.mark.parametrize("model", ["mythos", "published"])
def test_training_draws_nothing_from_global_generators(
    model: str, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    """A checkpoint therefore needs no generator state, which could not be split among another number of ranks."""
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, train__steps=3, checkpoint__every=2)
    for first, second, third in two_ranks.run(states_after_each_step, config):
        assert first == second == third


def failure(config: Config, accept: tuple[str, ...] = ()) -> str:
    try:
        run_training(config, accept)
    except UserError as error:
        return str(error)
    return "no error"


def test_other_data_than_the_checkpoints_is_refused(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config("looped-moe", tiny_data, run, ranks=2, train__steps=4, **MOE)
    two_ranks.run(run_training, config)

    finished = two_ranks.run(run_training, config)
    assert finished == [0, 0], "a finished run makes no further steps"
    assert len(curve(config, "train/loss")) == 4

    longer = MOE | {"train__steps": 6}
    elsewhere = write_data_set(tmp_path / "data", VOCABULARY, seed=1)
    other_data = tiny_config("looped-moe", elsewhere, run, ranks=2, **longer)
    assert (
        "the run was started with other data (sources.data.fingerprint: "
        in two_ranks.run(failure, other_data, ("train.steps",))[0]
    )
