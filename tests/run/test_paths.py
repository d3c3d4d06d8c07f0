"""Runs that are read in another folder than that in which they were started, or that were moved."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mythos.config.load import load_run, to_dict
from mythos.errors import UserError
from mythos.run.directory import RunDirectory, prepare
from mythos.run.journal import STARTED, append_event
from mythos.run.paths import found_from_here
from tests.cluster import clean_environment, run
from tests.tiny import tiny_config


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a run with relative paths was started."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    monkeypatch.chdir(folder)
    prepare(tiny_config("dense", Path("data"), Path("runs/a")), accept=())
    append_event(Path("runs/a"), STARTED, command="mythos train", working_directory=str(folder))
    return folder


def seen(directory: Path) -> tuple[str | None, str]:
    config = found_from_here(load_run(RunDirectory(directory).config), directory)
    return config.data.directory, config.run.directory


def test_in_its_own_folder_the_paths_stay_as_they_are(project: Path) -> None:
    assert seen(Path("runs/a")) == ("data", "runs/a")


def test_from_elsewhere_the_data_is_found_where_the_run_was_started(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert seen(project / "runs/a") == (str(project / "data"), str(project / "runs/a"))
    moved = Path(shutil.move(project / "runs/a", tmp_path / "elsewhere"))
    assert seen(moved) == (str(project / "data"), str(moved))


def forget(project: Path) -> None:
    RunDirectory(project / "runs/a").events.unlink()


def remember_another(project: Path) -> None:
    append_event(project / "runs/a", STARTED, command="mythos train", working_directory="/no such folder")


@pytest.mark.parametrize("change", [forget, remember_another])
def test_a_tree_that_was_moved_with_run_and_data(
    change: Callable[[Path], None], project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the start folder was not recorded, as in runs of version 0.1."""
    change(project)
    monkeypatch.chdir("/")
    moved = Path(shutil.move(project, tmp_path / "moved"))
    assert seen(moved / "runs/a") == (str(moved / "data"), str(moved / "runs/a"))


def test_data_that_is_gone_is_named_with_the_folder_of_the_start(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "data").rmdir()
    monkeypatch.chdir("/")
    with pytest.raises(UserError) as refused:
        seen(project / "runs/a")
    assert str(refused.value) == (
        f"data.directory = 'data': not in this folder (/) nor in {project}, where the run was started: "
        "give data.directory=PATH"
    )


@pytest.mark.slow
def test_train_eval_and_resume_from_another_folder(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "data").symlink_to(tiny_data)
    config = tiny_config("dense", Path("data"), Path("runs/a"), train__steps=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    mythos, environ = [sys.executable, "-m", "launch.cli"], clean_environment()
    assert run([*mythos, "train", "config.yaml"], 100, environ, cwd=tmp_path).returncode == 0
    for command in (["eval", tmp_path / "runs/a"], ["train", tmp_path / "runs/a/config.yaml", "train.steps=3"]):
        done = run(
            [*mythos, *command, *(["--accept", "train.steps"] if command[0] == "train" else [])],
            100,
            environ,
            Path("/"),
        )
        assert done.returncode == 0, done.stderr
    assert not Path("/runs").exists()
    assert "resumed from" in done.stderr
    evaluations = tmp_path / "runs/a/evaluations"
    for kind in ("*.json", "*.npz", "events.out.tfevents.*"):
        assert len(list(evaluations.glob(kind))) == 1, "the figures, those of each document, the points"
