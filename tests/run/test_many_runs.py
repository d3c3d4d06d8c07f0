"""`mythos status` of several runs: found at any depth, a row for each, whatever is wrong with one of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from launch.table import Column, shown_columns
from mythos.run.directory import RunDirectory, prepare
from mythos.run.find import find_runs
from mythos.run.journal import ENDED, FAILED, STARTED, append_event
from mythos.run.status import read_status
from tests.screen import run_on_terminal, screen_lines
from tests.tiny import tiny_config

DONE, SAVED = {"exit_code": 0}, {"exit_code": 85}
BROKEN = {"exit_code": 1, "rank": 3, "host": "node7", "message": "a disk is gone: " + "x" * 200}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "finished": (ENDED, DONE),
    "preempted": (ENDED, SAVED),
    "sweep/lr_1e-3/failed": (FAILED, BROKEN),
    "sweep/killed": (STARTED, {}),
}
ROW = ["run", "state", "step", "loss", "val loss", "tokens/s", "last write", "cause, remedy"]


def metrics(step: int, loss: float | None) -> str:
    return json.dumps({"step": step, "train/loss": loss, "train/tokens": 120 * step, "perf/tokens_per_second": 6e4})


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A directory with four runs, an export and a directory without a run."""
    for name, (event, details) in RUNS.items():
        run = RunDirectory(tmp_path / name)
        prepare(tiny_config("dense", tmp_path / "data", run.path), accept=())
        append_event(run.path, event, **details)
        validation = json.dumps({"step": 10, "val/loss_depth_1": 4.0, "val/loss": 3.75})
        run.metrics.write_text(f"{metrics(10, 2.5)}\n{validation}\n", encoding="utf-8")
    exported = tmp_path / "finished" / "export"
    for directory in (exported, tmp_path / "exported", tmp_path / "none" / "below"):
        directory.mkdir(parents=True)
    for directory in (exported, tmp_path / "exported"):
        (directory / "config.yaml").write_bytes((tmp_path / "finished" / "config.yaml").read_bytes())
    return tmp_path


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_row_for_every_run_below_a_directory(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(runs)]) == 0
    lines = [cells(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == sorted(RUNS)
    assert all(line[2:6] == ["10 of 20", "2.5000", "3.7500", "60,000"] for line in lines)
    assert all(line[6].endswith(" s ago") for line in lines)
    found = {line[0]: (line[1], line[7]) for line in lines}
    assert found["finished"] == ("finished", "-")
    assert found["preempted"] == ("preempted", "saved: start it again to resume")
    assert found["sweep/killed"] == ("killed", "start it again to resume")
    assert found["sweep/lr_1e-3/failed"] == ("failed", f"{BROKEN['message']} (rank 3 on node7, exit code 1)")


def test_runs_that_are_named(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = [str(runs / "finished"), str(runs / "preempted")]
    assert main(["status", *both, str(runs / "finished")]) == 0
    assert [cells(line)[0] for line in capsys.readouterr().out.splitlines()] == both
    assert main(["status", *both, "--json"]) == 0
    assert [(run["directory"], run["state"]) for run in json.loads(capsys.readouterr().out)] == [
        (both[0], "finished"),
        (both[1], "preempted"),
    ]
    assert main(["status", both[0], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished", "an object, not a list"


def test_a_directory_without_runs_is_one_line(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("none", "missing"):
        assert main(["status", str(runs / name)]) == 2
        assert capsys.readouterr() == (
            "",
            f"mythos: {runs / name}: not a run directory (config.yaml is missing): give the directory of a run, or one "
            "that contains runs\n",
        )
    assert main(["status", str(runs / "none"), str(runs / "finished")]) == 2
    printed = capsys.readouterr()
    assert cells(printed.out)[:2] == [str(runs / "finished"), "finished"], "the others are printed"
    assert printed.err.startswith(f"mythos: {runs / 'none'}: no run there: ")


def test_damaged_runs_are_rows(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "finished" / "config.yaml").write_bytes(b"\xff[")
    (runs / "preempted" / "config.yaml").unlink()
    with (runs / "sweep" / "killed" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": 11, "train/loss": 2.0, "train/tokens": "many"}) + "\n")
    assert main(["status", str(runs)]) == 0
    found = {cells(line)[0]: cells(line)[1:] for line in capsys.readouterr().out.splitlines()}
    assert sorted(found) == sorted(RUNS)
    assert found["finished"][:3] == ["finished", "10", "2.5000"], "what could be read"
    assert "config.yaml: damaged, not UTF-8" in found["finished"][-1]
    assert found["preempted"][-1].endswith("config.yaml: missing: restore it; saved: start it again to resume")
    assert found["sweep/killed"][:3] == ["killed", "10 of 20", "2.5000"], "a line with a wrong type is left out"


def test_loops_of_links_and_hidden_directories_are_not_followed(runs: Path) -> None:
    (runs / "none" / "up").symlink_to(runs)
    (runs / "none" / "a link").symlink_to(runs / "finished")
    (runs / "none" / "dangling").symlink_to(runs / "gone")
    (runs / "finished").rename(runs / ".finished")
    assert [str(path.relative_to(runs)) for path in find_runs(runs)] == sorted(RUNS)[1:]
    (runs / ".finished").rename(runs / "finished")
    assert find_runs(runs / "none") == [runs / "none" / "a link", *sorted(runs / "none" / "up" / name for name in RUNS)]


def test_a_run_that_has_logged_no_number_yet(runs: Path) -> None:
    run = RunDirectory(runs / "finished")
    run.metrics.write_text(metrics(1, None) + "\n", encoding="utf-8")
    status = read_status(run.path)
    assert (status.step, status.loss, status.validation, status.problem) == (1, None, {}, None)


def test_a_narrow_terminal_shows_fewer_columns(runs: Path) -> None:
    program = f"import sys; from launch.cli import main; sys.exit(main(['status', {str(runs)!r}]))"
    headers = {}
    for width in (200, 100, 60):
        code, written = run_on_terminal(program, COLUMNS=str(width), NO_COLOR="1")
        assert code == 0
        lines = [line for line in screen_lines(written) if line.strip()]
        assert max(map(len, lines)) <= width
        headers[width] = cells(lines[0])
        (row,) = (cells(line) for line in lines if line.split()[0] == "preempted")
        assert row[1:4] == ["preempted", "10 of 20", "2.5000"], "no number is wrapped"
    assert headers[200] == ROW
    assert headers[100][-1] == "cause, remedy"
    assert headers[60] == ["run", "state", "step", "loss"]


def test_columns_are_left_out_in_the_order_of_their_numbers() -> None:
    columns = [Column("a" * 10, is_number=True, if_it_fits=rank) for rank in (None, 2, None, 1)]
    row = ["1"] * 4
    assert [shown_columns(columns, [row], width) for width in (52, 51, 38, 20)] == [
        [0, 1, 2, 3],
        [0, 2, 3],
        [0, 2],
        [0, 2],
    ]
