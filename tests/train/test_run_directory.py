import json
from pathlib import Path

import pytest

from mythos.errors import UserError
from mythos.train.run_directory import prepare, record_environment
from tests.tiny import tiny_config


def test_another_configuration_in_the_same_directory_is_refused_with_the_difference(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    prepare(tiny_config("looped-moe", data, run), accept_changes=False)
    before = (run / "config.yaml").read_text()
    other = tiny_config("looped-moe", data, run, optim__learning_rate=1e-4, seed=7, train__steps=99)
    with pytest.raises(UserError) as error:
        prepare(other, accept_changes=False)
    message = str(error.value)
    assert "  optim.learning_rate: 0.003 -> 0.0001\n" in message
    assert "  seed: 42 -> 7\n" in message
    assert "train.steps" not in message, "a longer run is the same run"
    assert "--accept-changes" in message
    assert (run / "config.yaml").read_text() == before

    changed = prepare(other, accept_changes=True)
    assert changed == {"optim.learning_rate": (0.003, 0.0001), "seed": (42, 7), "train.steps": (20, 99)}
    assert prepare(other, accept_changes=False) == {}


def test_another_model_is_refused(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    prepare(tiny_config("looped-moe", data, run), accept_changes=False)
    with pytest.raises(UserError, match="model.kind: 'looped' -> 'dense'"):
        prepare(tiny_config("dense", data, run), accept_changes=False)


def test_what_changes_no_number_may_change(tmp_path: Path) -> None:
    run = tmp_path / "run"
    prepare(tiny_config("looped-moe", tmp_path / "data", run), accept_changes=False)
    moved = tiny_config(
        "looped-moe", tmp_path / "moved", run, checkpoint__every=7, eval__every=3, loop__recompute=False
    )
    assert set(prepare(moved, accept_changes=False)) == {
        "data.directory",
        "checkpoint.every",
        "eval.every",
        "loop.recompute",
    }


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not empty and no run"):
        prepare(tiny_config("looped", tmp_path / "data", tmp_path), accept_changes=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run.directory = .*file/run.*choose a directory that can be written"):
        prepare(tiny_config("looped", tmp_path / "data", tmp_path / "file" / "run"), accept_changes=False)


def test_every_life_is_recorded(tmp_path: Path) -> None:
    for _ in range(2):
        record_environment(tmp_path, ["here", "there"], "cpu", "fp32")
    lives = json.loads((tmp_path / "environment.json").read_text())
    assert [life["hosts"] for life in lives] == [["here", "there"]] * 2
    assert lives[0]["packages"]["torch"]
