"""A resumed run is the uninterrupted run, to the last bit."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mythos.checkpoint import layout
from mythos.config.schema import Config
from mythos.engine.engine import TrainingEngine
from mythos.errors import UserError
from mythos.run.metrics import read_metrics
from tests.data.conftest import write_data_set
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import curve, run_training

EXACT = ("train/loss", "train/gradient_norm", "loop/state_norm", "moe/load_max_over_mean", "val/loss_depth_3")
STEPS, SAVED = 12, 6
MOE: dict[str, Any] = {"checkpoint__every": SAVED, "eval__every": 3, "parallel__expert_parallel_size": 2}


def as_if_killed_after(config: Config, step: int, directory: Path) -> Config:
    """A copy of the run as a kill some steps after the checkpoint would have left it."""
    source = Path(config.run.directory)
    shutil.copytree(source, directory)
    (directory / "checkpoints" / "latest").write_text(layout.tag(step))
    shutil.rmtree(directory / "checkpoints" / layout.tag(config.train.steps))
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step + 3]
    (directory / "metrics.jsonl").write_text("".join(kept) + '{"step": 10, "train/lo')
    (directory / "config.yaml").write_text((source / "config.yaml").read_text().replace(str(source), str(directory)))
    return tiny_config_in(config, directory)


def tiny_config_in(config: Config, directory: Path) -> Config:
    from dataclasses import replace

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
    events = EventAccumulator(str(tmp_path / "resumed" / "tensorboard"))
    events.Reload()
    lines = read_metrics(tmp_path / "resumed")
    names = {name for line in lines for name in line} - {"step"}
    assert names == set(events.Tags()["scalars"])
    for name in names:
        points = [(point.step, pytest.approx(point.value, rel=1e-6)) for point in events.Scalars(name)]
        assert points == [(line["step"], line[name]) for line in lines if name in line], name
    assert "config/text_summary" in events.Tags()["tensors"]


def test_old_checkpoints_are_removed_and_the_state_is_stored(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    options = MOE | {"checkpoint__every": 3, "checkpoint__keep_last": 2}
    config = tiny_config("looped-moe", tiny_data, tmp_path / "run", ranks=2, train__steps=10, **options)
    two_ranks.run(run_training, config)
    directory = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in directory.glob("step_*")) == ["step_00000009", "step_00000010"]
    assert (directory / "latest").read_text() == "step_00000010"
    state = json.loads((directory / "step_00000010" / "state.json").read_text())
    assert (state["step"], state["samples"], state["data"]["seed"]) == (10, 80, 42)
    assert state["world"] == {"ranks": 2, "zero_stage": 3, "expert_parallel_size": 2, "precision": "fp32"}
    assert state["tokens"] == 80 * 15


def test_a_start_before_the_first_checkpoint_begins_again_without_doubled_steps(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    config = tiny_config("looped-moe", tiny_data, tmp_path / "run", ranks=2, train__steps=3, **MOE)
    two_ranks.run(run_training, config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert two_ranks.run(run_training, config) == [0, 0]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3]
    assert [line["step"] for line in lines if "val/loss_depth_3" in line] == [0, 3]


def test_what_a_killed_save_left_is_set_aside(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, train__steps=6, checkpoint__every=3)
    two_ranks.run(run_training, tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, train__steps=1))
    half = tmp_path / "run" / "checkpoints" / "step_00000002.partial"
    half.mkdir()
    (half / "weights_00000.safetensors").write_bytes(b"half")
    assert two_ranks.run(run_training, config) == [0, 0]
    directory = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in directory.glob("step_*")) == ["step_00000003", "step_00000006"]
    assert (directory / "set_aside" / half.name / "weights_00000.safetensors").read_bytes() == b"half"


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
    """So that a checkpoint needs no state of them, which could not be split among another number of ranks."""
    config = tiny_config(model, tiny_data, tmp_path / "run", ranks=2, train__steps=3, checkpoint__every=2)
    for first, second, third in two_ranks.run(states_after_each_step, config):
        assert first == second == third


def failure(config: Config, accept: tuple[str, ...] = ()) -> str:
    try:
        run_training(config, accept)
    except UserError as error:
        return str(error)
    return "no error"


def test_what_does_not_fit_the_checkpoint_is_refused(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny_config("looped-moe", tiny_data, run, ranks=2, train__steps=4, **MOE)
    two_ranks.run(run_training, config)

    finished = two_ranks.run(run_training, config)
    assert finished == [0, 0], "a finished run stays finished"
    assert len(curve(config, "train/loss")) == 4

    longer = MOE | {"train__steps": 6}
    elsewhere = write_data_set(tmp_path / "data", VOCABULARY, seed=1)
    other_data = tiny_config("looped-moe", elsewhere, run, ranks=2, **longer)
    assert "the run was started on other data (sources.data.fingerprint: " in two_ranks.run(failure, other_data)[0]
