"""An experiment is carried out on this machine, also if it is killed in between, and reported."""

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from launch.commands import invoke
from mythos.parity.experiment import PlannedRun, load_experiment, planned_runs
from mythos.parity.results import read_result
from mythos.parity.runs import LocalRunner, progress
from mythos.run.metrics import read_metrics
from tests.parity.conftest import LIMIT_S, SMOKE, in_a_fork, report_of, run_command, write_smoke_experiment
from tests.spawn import Job

NEEDS = (("training", "train"), ("evaluation", "eval"))


@pytest.fixture(autouse=True)
def in_the_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)


def test_after_a_kill_and_a_failure_the_report_is_that_of_an_undisturbed_experiment(
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_smoke_experiment(tmp_path)
    shutil.copytree(undisturbed, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/report")
    for arm in ("looped", "small"):
        shutil.rmtree(tmp_path / "runs" / arm / "seed-1")
    disturbed = {"looped": "killed", "small": "failed"}

    def disturb(self: LocalRunner, run: PlannedRun, arguments: Sequence[str]) -> int:
        if run.seed == 1 and (what := disturbed.pop(run.arm, None)):
            if what == "failed":
                return 74
            job = Job(1, run_command, Path.cwd(), list(arguments), output=tmp_path / "output")
            until = time.monotonic() + LIMIT_S
            while not list(run.directory.glob("checkpoints/step_00000002/state.json")):
                assert time.monotonic() < until, job.text()
                time.sleep(0.05)
            job.kill()
            return job.wait(LIMIT_S)
        return in_a_fork(self, run, arguments)

    monkeypatch.setattr(LocalRunner, "_command", disturb)
    assert invoke(["parity", "run", str(path), "--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "small, seed 1: training failed with exit code 74: see " in printed
    assert "looped, seed 1: training failed with exit code -9: see " in printed
    assert not disturbed
    assert invoke(["parity", "report", str(path)]) == 0
    partial = (tmp_path / "runs/report/report.md").read_text(encoding="utf-8")
    assert "- looped, seed 1: killed, training to do" in partial
    assert "- small, seed 1: not started, training to do" in partial
    assert "no verdict: one seed" in partial
    capsys.readouterr()
    assert invoke(["parity", "jobs", str(path)]) == 0
    lines = [line.split("\t")[:3] for line in capsys.readouterr().out.splitlines()]
    both = [[[need, f"smoke/{arm}/{job}", "1"] for need, job in NEEDS] for arm in ("looped", "small")]
    assert lines == [*both[0], *both[1], ["report", "smoke/report"]]

    assert invoke(["parity", "run", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": training\n") == 2, "what was finished is not done again"
    assert report_of(tmp_path / "runs") == report_of(undisturbed)


def test_status(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["parity", "status", str(SMOKE)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:5] == ["looped", "1", "evaluated", "4", "4"]
    assert rows[1][:4] == ["looped-equal-flops", "1", "evaluated", rows[1][4]]
    assert invoke(["parity", "jobs", str(SMOKE)]) == 0
    assert not capsys.readouterr().out


def test_the_numbers_of_the_report_are_those_of_the_runs(undisturbed: Path) -> None:
    experiment = load_experiment(SMOKE)
    report, losses = report_of(undisturbed), {}
    for run in planned_runs(experiment):
        found = progress(experiment, run)
        assert found.evaluation is not None
        result = read_result(run.directory, found.evaluation)
        evaluation = json.loads(found.evaluation.read_text(encoding="utf-8"))
        name = "eval/documents_bits_per_byte" + ("" if result.depth is None else "_depth_4")
        losses.setdefault(run.arm, []).append(evaluation[name])
        lines = read_metrics(run.directory)
        assert result.tokens == lines[-1].get("train/tokens", result.tokens) == run.config.train.steps * 4 * 256
        steps = [line for line in lines if "perf/step_seconds" in line]
        spent = sum(line["perf/step_seconds"] * line["perf/model_flops_per_second"] for line in steps)
        assert result.curve.flops[-1] == pytest.approx(spent, rel=1e-6)
        assert result.curve.losses.tolist() == [line["val/loss"] for line in lines if "val/loss" in line]
    for arm, values in losses.items():
        assert report["arms"][arm]["bits_per_byte"]["estimate"] == pytest.approx(np.mean(values), rel=1e-6)
    d = np.mean(losses["looped"]) - np.mean(losses["large"])
    gap = np.mean(losses["small"]) - np.mean(losses["large"])
    decision = report["decision"]
    assert decision["difference"]["estimate"] == pytest.approx(d, rel=1e-5)
    assert decision["missed"]["estimate"] == pytest.approx(d - 0.25 * gap, rel=1e-5)
    assert decision["share"]["estimate"] == pytest.approx((gap - d) / gap, rel=1e-5)
    expected = {(True, False): "matches", (False, True): "does not match", (False, False): "not decided"}
    missed = decision["missed"]
    assert decision["answer"] == expected[missed["high"] < 0, missed["low"] > 0]


def test_the_report_says_what_other_loop_steps_change_by_seed(undisturbed: Path) -> None:
    experiment = load_experiment(SMOKE)
    found = [progress(experiment, run).evaluation for run in planned_runs(experiment) if run.arm == "looped"]
    evaluations = [json.loads(each.read_text(encoding="utf-8")) for each in found if each is not None]
    text = (undisturbed / "report/report.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| looped \| (\d+) in place of 4 \| (\S+) \| (\S+) \.\.\. (\S+) \| (.*) \| .* \|$", text, re.M)
    assert [int(depth) for depth, *_ in rows] == [depth for depth in experiment.evaluation.depths if depth != 4]
    for depth, estimate, low, high, by_seed in rows:
        name = "eval/documents_bits_per_byte_depth_"
        expected = [each[name + depth] - each[f"{name}4"] for each in evaluations]
        assert [float(each) for each in by_seed.split(",")] == pytest.approx(expected, rel=0.01, abs=1e-6)
        assert float(estimate) == pytest.approx(np.mean(expected), rel=0.01, abs=1e-6)
        assert float(low) <= float(estimate) <= float(high)


def test_any_of_the_runs_can_be_compared(undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", str(undisturbed), "--reference", "large", "--output", str(tmp_path / "report")]
    assert invoke(arguments) == 0
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines() if " tokens (" in line]
    decision = report_of(undisturbed)["decision"]["difference"]
    looped = next([cell.strip() for cell in row if cell] for row in rows if row[0] == "looped")
    assert looped[2] == "bits_per_byte on 20 documents"
    assert looped[3:5] == [f"{decision['estimate']:+.4f}", f"{decision['low']:.4f} ... {decision['high']:.4f}"]
    report = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == {"arms", "curves", "depth"}
    assert "| model.layers |" in report


def test_scores_of_tasks_are_in_the_report(undisturbed: Path, tmp_path: Path) -> None:
    path = write_smoke_experiment(tmp_path)
    changed = path.read_text(encoding="utf-8").replace(
        "evaluation:\n", "evaluation:\n  tasks: [configs/eval/core.yaml]\n"
    )
    path.write_text(changed, encoding="utf-8")
    shutil.copytree(undisturbed, tmp_path / "runs")
    for file in (tmp_path / "runs").glob("*/*/evaluations/*.json"):
        arm, seed = file.parts[-4], int(file.parts[-3].removeprefix("seed-"))
        found = json.loads(file.read_text(encoding="utf-8"))
        found["wanted"]["tasks"] = ["configs/eval/core.yaml"]
        score = {"looped": 0.25, "large": 0.5}.get(arm, 0.125) + seed / 1000
        found |= {"eval/core": score} if arm in ("small", "large") else {"eval/core_depth_4": score}
        file.write_text(json.dumps(found), encoding="utf-8")
    assert invoke(["parity", "report", str(path)]) == 0
    report = (tmp_path / "runs/report/report.md").read_text(encoding="utf-8")
    row = next(line.split(" | ") for line in report.splitlines() if line.startswith("| looped | core | "))
    assert (row[2], row[4]) == ("-0.2500", "worse |")
    assert "0.2515 (0.0007)" in report, "the mean, and the deviation over the seeds"


def test_a_design_that_was_changed_after_the_first_run_shows(undisturbed: Path, tmp_path: Path) -> None:
    text = SMOKE.read_text(encoding="utf-8")
    report = (undisturbed / "report/report.md").read_text(encoding="utf-8")
    assert "is the one with which the first run began" in report
    changed = tmp_path / "changed.yaml"
    changed.write_text(text.replace("margin: 0.25", "margin: 1"), encoding="utf-8")
    assert invoke(["parity", "report", str(changed), "--output", str(tmp_path / "report")]) == 0
    report = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "**The design was changed after the first run.**" in report
    pictures = {path.stem for path in (tmp_path / "report").glob("*.png")}
    assert pictures == {"arms", "curves", "depth"} == set(re.findall(r"\]\((\w+)\.png\)", report))
