"""A resumed run is the uninterrupted run, to the last bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mythos.config.schema import Config
from mythos.errors import UserError
from mythos.metrics.writer import read_metrics
from mythos.train import checkpoint
from mythos.train.engine import TrainingEngine
from tests.data.conftest import write_data_set
from tests.spawn import RankPool
from tests.tiny import VOCABULARY, tiny_config
from tests.train.runs import curve, run_training

EXACT = ("train/loss", "train/gradient_norm", "loop/state_norm", "moe/load_max_over_mean", "val/loss_depth_3")
MOE: dict[str, Any] = {"checkpoint__every": 10, "eval__every": 5, "parallel__expert_parallel_size": 2}


def as_if_killed_after(config: Config, step: int, directory: Path) -> Config:
    """A copy of the run as a kill some steps after the checkpoint would have left it."""
    source = Path(config.run.directory)
    shutil.copytree(source, directory)
    (directory / "checkpoints" / "latest").write_text(checkpoint.tag(step))
    shutil.rmtree(directory / "checkpoints" / checkpoint.tag(config.train.steps))
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= step + 3]
    (directory / "metrics.jsonl").write_text("".join(kept) + '{"step": 14, "train/lo')
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
        ("published", {"checkpoint__every": 10}),
        ("dense", {"checkpoint__every": 10, "parallel__zero_stage": 0}),
    ],
)
def test_resumed_equals_uninterrupted_to_the_last_bit(
    model: str, overrides: dict[str, Any], two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    straight = tiny_config(model, tiny_data, tmp_path / "straight", ranks=2, train__steps=20, **overrides)
    assert two_ranks.run(run_training, straight) == [0, 0]
    resumed = as_if_killed_after(straight, 10, tmp_path / "resumed")
    assert two_ranks.run(run_training, resumed) == [0, 0]
    for name in EXACT:
        assert curve(resumed, name) == curve(straight, name), name
    steps = [line["step"] for line in read_metrics(Path(resumed.run.directory)) if "train/loss" in line]
    assert steps == list(range(1, 21)), "no step is missing or doubled"


def test_tensorboard_shows_one_curve_under_the_names_of_metrics_jsonl(
    two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    straight = tiny_config("looped-moe", tiny_data, tmp_path / "straight", ranks=2, train__steps=20, **MOE)
    assert two_ranks.run(run_training, straight) == [0, 0]
    resumed = as_if_killed_after(straight, 10, tmp_path / "resumed")
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
    assert len(list((directory / "step_00000010").glob("rng_rank_*.pt"))) == 2


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


def test_what_a_killed_save_left_is_removed(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, train__steps=6, checkpoint__every=3)
    half = tmp_path / "run" / "checkpoints" / "step_00000002"
    two_ranks.run(run_training, tiny_config("looped", tiny_data, tmp_path / "run", ranks=2, train__steps=1))
    half.mkdir()
    (half / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"half")
    assert two_ranks.run(run_training, config) == [0, 0]
    found = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert found == ["step_00000003", "step_00000006"]


def random_numbers(config: Config, path: Path) -> tuple[list[float], list[float]]:
    """Random numbers drawn after a save, and after a load that follows other draws."""

    def draw() -> list[float]:
        return [torch.rand(1).item(), np.random.rand()]

    engine = TrainingEngine(config, torch.device("cpu"))
    torch.manual_seed(100 + dist.get_rank())
    checkpoint.save(engine, path, 1, {"data": {}}, keep_last=1)
    expected = draw()
    draw()
    checkpoint.load(engine, path / checkpoint.tag(1))
    return expected, draw()


def test_every_ranks_random_states_come_back(two_ranks: RankPool, tiny_data: Path, tmp_path: Path) -> None:
    config = tiny_config("looped", tiny_data, tmp_path / "run", ranks=2)
    drawn = two_ranks.run(random_numbers, config, tmp_path / "checkpoints")
    assert all(expected == again for expected, again in drawn)
    assert drawn[0] != drawn[1], "ranks have states of their own"


def failure(config: Config, accept_changes: bool = False) -> str:
    try:
        run_training(config, accept_changes)
    except UserError as error:
        return str(error)
    return "no error"


def test_what_does_not_fit_the_checkpoint_is_refused(
    one_rank: RankPool, two_ranks: RankPool, tiny_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = tiny_config("looped-moe", tiny_data, run, ranks=2, train__steps=4, **MOE)
    two_ranks.run(run_training, config)

    finished = two_ranks.run(run_training, config)
    assert finished == [0, 0], "a finished run stays finished"
    assert len(curve(config, "train/loss")) == 4

    longer = MOE | {"train__steps": 6}
    other_stage = tiny_config("looped-moe", tiny_data, run, ranks=2, **(longer | {"parallel__zero_stage": 2}))
    messages = two_ranks.run(failure, other_stage)
    assert messages[0] == messages[1]
    assert "written with another layout (zero_stage 3 -> 2)" in messages[0]

    alone = tiny_config("looped-moe", tiny_data, run, ranks=1, **(longer | {"parallel__expert_parallel_size": 1}))
    assert "(ranks 2 -> 1, expert_parallel_size 2 -> 1)" in one_rank.run(failure, alone)[0]

    elsewhere = write_data_set(tmp_path / "data", VOCABULARY, seed=1)
    other_data = tiny_config("looped-moe", elsewhere, run, ranks=2, **longer)
    assert "the run was started on other data (sources.data.fingerprint: " in two_ranks.run(failure, other_data)[0]

    newest = run / "checkpoints" / "step_00000004"
    (newest / "rng_rank_00001.pt").write_bytes(b"rubbish")
    assert "cannot be read" in two_ranks.run(failure, tiny_config("looped-moe", tiny_data, run, ranks=2, **longer))[1]
    (newest / "state.json").write_text("{}")
    assert "state.json: damaged" in two_ranks.run(failure, config)[0]
    (run / "checkpoints" / "latest").write_text("")
    assert "latest: is empty" in two_ranks.run(failure, config)[0]
    (run / "checkpoints" / "latest").write_text("step_00000099")
    assert "names step_00000099, which is missing or incomplete" in two_ranks.run(failure, config)[0]
