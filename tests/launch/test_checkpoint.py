"""`mythos checkpoint list|verify`: what they print is what a start does."""

import shutil
from pathlib import Path

import pytest

from launch.cli import main
from mythos.checkpoint import layout
from mythos.checkpoint.manifest import optimizer_file, weights_file
from mythos.run.directory import LATEST_FILE, MANIFEST_FILE, RunDirectory
from tests.checkpoint.test_layout import write


def command(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    exit_code = main(["checkpoint", name, str(run)])
    return exit_code, capsys.readouterr().out.splitlines()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    for step in (3, 6, 9):
        write(RunDirectory(tmp_path / "run").checkpoints, step)
    return tmp_path / "run"


def states(lines: list[str]) -> list[str]:
    return [line.split("  ")[-1] for line in lines]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_valid_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("list", run, capsys)[0] == 0
    assert states(command("list", run, capsys)[1]) == ["would be resumed", "complete", "complete"]
    exit_code, lines = command("verify", run, capsys)
    assert (exit_code, states(lines)) == (0, ["valid, would be resumed", "valid, complete", "valid, complete"])


def test_a_missing_file_is_found_without_reading(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (RunDirectory(run).checkpoints / layout.tag(9) / optimizer_file(0)).unlink()
    exit_code, lines = command("list", run, capsys)
    assert exit_code == 0
    assert "optimizer_00000.safetensors: No such file" in lines[0]
    assert states(lines[1:3]) == ["would be resumed", "complete"]
    assert lines[3] == f"{run}: the next start resumes from step_00000006 and sets newer checkpoints aside"


def test_damage_older_than_the_resumed_checkpoint_does_not_concern_a_start(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(RunDirectory(run).checkpoints / layout.tag(3) / weights_file(0))
    exit_code, lines = command("verify", run, capsys)
    assert exit_code == 2
    assert states(lines[:3]) == ["valid, would be resumed", "valid, complete", "damaged"]
    assert "its content does not match the hash" in lines[3]
    assert len(lines) == 4, "it does not affect the next start"


def test_no_valid_checkpoint_is_left(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (3, 6, 9):
        flip(RunDirectory(run).checkpoints / layout.tag(step) / MANIFEST_FILE)
    for name, code in (("list", 0), ("verify", 2)):
        exit_code, lines = command(name, run, capsys)
        assert exit_code == code
        assert lines[-1] == (
            f"{run}: no valid checkpoint: a start is refused until one is restored or all are moved away"
        )


def test_an_older_checkpoint_that_the_user_has_chosen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (RunDirectory(run).checkpoints / LATEST_FILE).write_text(layout.tag(6), encoding="utf-8")
    assert states(command("list", run, capsys)[1]) == [
        "newer than latest, does not count",
        "would be resumed",
        "complete",
    ]


def test_a_checkpoint_that_disappears_while_it_is_listed_is_no_error(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = layout.complete_checkpoints

    def then_remove(directory: Path) -> list[Path]:
        found = complete(directory)
        shutil.rmtree(directory / layout.tag(3), ignore_errors=True)
        return found

    monkeypatch.setattr(layout, "complete_checkpoints", then_remove)
    for name in ("list", "verify"):
        lines = command(name, run, capsys)[1]
        assert "would be resumed" in lines[0]


def test_a_run_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (RunDirectory(tmp_path).checkpoints).mkdir()
    assert command("list", tmp_path, capsys) == (0, [f"{tmp_path}: no complete checkpoint: a start begins at step 0"])


def test_one_checkpoint_is_verified_by_its_step(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(RunDirectory(run).checkpoints / layout.tag(3) / weights_file(0))
    for step, code, state in ((6, 0, "valid"), (3, 2, "damaged")):
        assert main(["checkpoint", "verify", str(run), "--step", str(step)]) == code
        assert states(capsys.readouterr().out.splitlines()[:1]) == [state]
    assert main(["checkpoint", "verify", str(run), "--step", "4"]) == 2
    assert "has checkpoints of steps 9, 6, 3" in capsys.readouterr().err
