import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from mythos.errors import UserError
from mythos.run import directory as run_directory
from mythos.run.directory import lock, prepare, write_config
from tests.tiny import tiny_config


def test_another_configuration_in_the_same_directory_is_refused_with_the_difference(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    prepare(tiny_config("looped-moe", data, run), accept_changes=False)
    before = (run / "config.yaml").read_text()
    other = tiny_config("looped-moe", data, run, optim__learning_rate=1e-4, train__steps=99)
    with pytest.raises(UserError) as error:
        prepare(other, accept_changes=False)
    message = str(error.value)
    assert "  optim.learning_rate: 0.003 -> 0.0001\n" in message
    assert "train.steps" not in message, "a longer run is the same run"
    assert "--accept-changes" in message

    assert prepare(other, accept_changes=True) == {"optim.learning_rate": (0.003, 0.0001), "train.steps": (20, 99)}
    assert (run / "config.yaml").read_text() == before, "it is replaced only once all checks of the start have passed"
    write_config(other)
    assert prepare(other, accept_changes=False) == {}


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"model__width": 64}, "model.width: 32 -> 64"),
        ({"data__sequence_length": 31}, "data.sequence_length: 15 -> 31"),
    ],
)
def test_what_the_saved_state_depends_on_never_changes(tmp_path: Path, overrides: dict[str, Any], line: str) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    prepare(tiny_config("looped-moe", data, run), accept_changes=False)
    with pytest.raises(UserError, match=line) as error:
        prepare(tiny_config("looped-moe", data, run, **overrides), accept_changes=True)
    assert "--accept-changes" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"seed": 7}, "seed: 42 -> 7"),
        ({"train__global_batch_sequences": 16}, "train.global_batch_sequences: 8 -> 16"),
    ],
)
def test_what_changes_the_run_is_refused_unless_asked_for(tmp_path: Path, overrides: dict[str, Any], line: str) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    prepare(tiny_config("looped-moe", data, run), accept_changes=False)
    changed = tiny_config("looped-moe", data, run, **overrides)
    with pytest.raises(UserError, match=f"{line}\n.*--accept-changes"):
        prepare(changed, accept_changes=False)
    assert len(prepare(changed, accept_changes=True)) == 1


@pytest.mark.parametrize("content", ["", "train: 5", "a: [", "\xff\xfe"])
def test_a_damaged_config_is_named(tmp_path: Path, content: str) -> None:
    config = tiny_config("looped", tmp_path / "data", tmp_path / "run")
    prepare(config, accept_changes=False)
    (tmp_path / "run" / "config.yaml").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="config.yaml: damaged"):
        prepare(config, accept_changes=False)


def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    held = lock(tmp_path)
    assert held is not None
    with pytest.raises(UserError, match=f"process {os.getpid()} on .* trains here"):
        lock(tmp_path)
    held.close()
    again = lock(tmp_path)
    assert again is not None
    again.close()


def test_a_job_that_slurm_has_restarted_waits_for_the_lock_of_its_previous_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setattr(run_directory, "LOCK_WAIT_S", 0.1)
    held = lock(tmp_path)
    assert held is not None
    threading.Timer(0.5, held.close).start()
    with caplog.at_level("WARNING", "mythos"):
        again = lock(tmp_path)
    assert again is not None
    assert re.search(rf"locked by process {os.getpid()} on .*: waiting up to 300 s", caplog.text)

    monkeypatch.setattr(run_directory, "LOCK_WAIT_AFTER_RESTART_S", 0.1)
    with pytest.raises(UserError, match="trains here: wait for it, or stop it"):
        lock(tmp_path)
    again.close()


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
