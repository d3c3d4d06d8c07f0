"""What ``benchmarks.soak`` relies on: a plan from the seed alone, a judge that finds differences, the costs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.soak_faults import STRIKES
from benchmarks.soak_plan import IN_A_RANK, KILLED_TWICE, KINDS, NAN, STEPS_A_FAULT, plan, rank_faults, run_steps
from benchmarks.soak_report import Cost, Outcome, StepRecord, cost, judge, read_outcome, summary, table
from mythos.run.directory import RunDirectory
from tests.cluster import REPO
from tests.faults.victim import FIRED, Faults

OUTCOME = Outcome([(1, 4.5), (2, 4.25), (3, 4.125)], {1: ["a", "b"], 2: ["c", "d"], 3: ["e", "f"]}, 3.0)


def test_the_plan_depends_only_on_the_seed() -> None:
    code = "from benchmarks.soak_plan import plan; print(plan(1, 40))"
    again = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, encoding="utf-8", check=True)
    assert again.stdout == f"{plan(1, 40)}\n"
    assert plan(2, 40) != plan(1, 40)
    assert plan(1, 40)[:7] == plan(1, 7)


def test_every_kind_occurs_and_every_fault_has_room_before_the_next_one() -> None:
    faults = plan(1, 2 * len(KINDS))
    assert sorted(fault.kind for fault in faults) == sorted(2 * KINDS)
    gaps = [later.step - fault.step for fault, later in pairwise(faults)]
    assert min(gaps) > STEPS_A_FAULT // 2
    assert faults[0].step >= STEPS_A_FAULT, "two checkpoints are complete"
    assert faults[-1].step < run_steps(len(faults))


def test_every_kind_is_caused_in_one_way() -> None:
    in_ranks = {fault.kind for fault in plan(1, len(KINDS)) if rank_faults(fault)}
    assert in_ranks >= {*IN_A_RANK, KILLED_TWICE, NAN}
    assert in_ranks | set(STRIKES) == set(KINDS)
    assert not in_ranks & set(STRIKES)


def test_a_fault_in_a_rank_waits_until_the_one_before_is_over() -> None:
    """Otherwise a rank could hang in the first step of an attempt, where the watchdog waits for half an hour."""
    before, fault = next(pair for pair in pairwise(plan(1, 40)) if pair[1].kind == "a rank that hangs")
    assert rank_faults(fault)[fault.name]["after"] == before.over


def test_the_judge_accepts_the_same_outcome() -> None:
    assert judge(OUTCOME, replace(OUTCOME, counted_s=9.0)) == []


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([(1, 4.5), (2, 4.25 + 1e-15), (3, 4.125)], "step 2: loss 4.250000000000001 instead of 4.25"),
        ([(1, 4.5), (3, 4.125)], "2 losses instead of 3"),
        ([(1, 4.5), (2, 4.25), (2, 4.25), (3, 4.125)], "4 losses instead of 3"),
    ],
)
def test_the_judge_finds_a_changed_a_missing_and_a_repeated_loss(losses: list[tuple[int, float]], message: str) -> None:
    (difference,) = judge(OUTCOME, replace(OUTCOME, losses=losses))
    assert difference.startswith(message)


@pytest.mark.parametrize(
    ("consumed", "messages"),
    [
        ({2: ["c", "a"]}, ["step 2: other sequences", "1 sequences were consumed more than once, for example a"]),
        ({2: ["c"]}, ["step 2: other sequences"]),
        ({4: ["g", "h"]}, ["step 4: other sequences"]),
        ({2: ["c", "d", "d"]}, ["step 2: other sequences", "1 sequences were consumed more than once, for example d"]),
    ],
)
def test_the_judge_finds_sequences_that_were_lost_or_consumed_twice(
    consumed: dict[int, list[str]], messages: list[str]
) -> None:
    found = judge(OUTCOME, replace(OUTCOME, sequences=OUTCOME.sequences | consumed))
    assert len(found) == len(messages)
    for difference, message in zip(found, messages, strict=True):
        assert difference.startswith(message)


def test_the_outcome_is_what_the_last_attempt_at_each_step_consumed(tmp_path: Path) -> None:
    lines = [{"step": step, "train/loss": 4.0, "perf/step_seconds": 0.5} for step in (1, 2)]
    records = [(1, "first", ["a"]), (2, "first", ["lost"]), (2, "second", ["b"]), (2, "second", ["c"])]
    write_lines(RunDirectory(tmp_path).metrics, lines)
    keys = ("step", "attempt", "sequences")
    write_lines(tmp_path / "sequences_0.jsonl", [dict(zip(keys, record, strict=True)) for record in records])
    assert read_outcome(tmp_path, tmp_path) == Outcome([(1, 4.0), (2, 4.0)], {1: ["a"], 2: ["b", "c"]}, 1.0)


def write_lines(path: Path, lines: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def test_the_cost_of_a_fault() -> None:
    """Killed in step 4, which is not finished; resumed from the checkpoint of step 1."""
    done = [StepRecord(step, "first", float(step), step + 0.5) for step in (1, 2, 3)]
    again = [StepRecord(step, "second", 20.0 + step, 20.5 + step) for step in (2, 3, 4)]
    assert cost("kill", 4.25, done, ends_attempt=True) is None
    assert cost("kill", 4.25, done + again, ends_attempt=True) == Cost("kill", 18.25, 2, True)
    assert cost("kill", 2.75, done + again, ends_attempt=True) == Cost("kill", 19.75, 2, True), (
        "step 3 was still finished"
    )
    assert cost("NaN", 2.25, done, ends_attempt=False) == Cost("NaN", 1.25, 0, False)


def test_the_report_has_median_worst_and_the_share_of_time_that_counted() -> None:
    lines = table([Cost("kill", 10.0, 3, True), Cost("kill", 30.0, 1, True), Cost("NaN", 0.5, 0, False)])
    assert [line.split() for line in lines[1:]] == [
        ["NaN", "1", "0.5", "0.5", "0"],
        ["kill", "2", "20.0", "30.0", "4"],
        ["all", "that", "ended", "an", "attempt", "2", "20.0", "30.0", "4"],
    ]
    counted, lost = summary(OUTCOME, replace(OUTCOME, counted_s=4.0), finished_steps=5, wall_s=16.0)
    assert counted == "time in steps that counted: 4 s of 16 s (25%); the same steps undisturbed: 3 s"
    assert lost == "lost steps: 2 (finished: 5, counted: 3)"


def test_the_moments_of_faults_in_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    plans = {
        "01": {"where": "forward", "rank": 1, "call": 2, "from_step": 5},
        "02": {"where": "load", "rank": 1, "call": 1, "after": "01"},
        "03": {"where": "nan gradient", "rank": 1, "step": 6},
        "04": {"where": "forward", "rank": 0, "call": 1},
    }
    for name, content in plans.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")

    def attempt() -> list[tuple[int, str]]:
        faults, due = Faults(tmp_path), []
        for step, where in [
            (0, "load"),
            *[(step, where) for step in range(4, 8) for where in ("forward", "nan gradient")],
        ]:
            faults.step = step
            due += [(step, where)] if faults.due(where) else []
        return due

    assert attempt() == [(6, "forward"), (6, "nan gradient")]
    assert attempt() == [(0, "load"), (6, "nan gradient")], "a NaN belongs to its step; the others occur once"
    assert sorted(path.stem for path in tmp_path.glob(f"*{FIRED}")) == ["01", "02", "03"]


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious", encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.soak", "--directory", str(tmp_path)]
    environ = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environ, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (
        2,
        f"soak: {tmp_path}: not empty, and not of a soak: give another --directory\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
