"""A signal loses no job, at any time from the first moment of the job to the first step, and it stops no other job."""

from pathlib import Path

import pytest

from tests.cluster import run
from tests.slurm.jobs import TWO_BY_ONE, Job, submit, submit_pretrain

NOT_BEGUN = "asked to stop before the run had begun; requeued, to resume from checkpoint none"


def test_the_signal_that_slurm_is_asked_for_ends_no_script_that_does_not_handle_it_yet(
    stand_in: dict[str, str], tmp_path: Path
) -> None:
    for number in range(4):
        job = submit_pretrain(stand_in, tmp_path / f"out{number}", "0")
        while (state := job.show("JobState")) == "PENDING":
            pass
        if state == "RUNNING":  # since this moment
            run(["scancel", "--batch", "--signal=URG", job.number], 20, stand_in)
        assert job.end(60) == "COMPLETED", job.log()


@pytest.mark.parametrize(
    ("to", "moment", "times"),
    [
        (("--batch", "--signal=USR1"), "start {}", 2),
        (("--signal=USR1",), "a rank that handles no signal", 1),
        (("--full", "--signal=USR2"), "a rank that handles no signal", 1),
    ],
    ids=["shell, before the ranks", "tasks", "shell and tasks"],
)
def test_a_signal_before_the_ranks_handle_signals_is_not_lost(
    to: tuple[str, ...], moment: str, times: int, stand_in: dict[str, str], tmp_path: Path
) -> None:
    """Also not if there are two in a row: no progress is expected of a run that has not begun."""
    job = submit_pretrain(stand_in, tmp_path / "out", *["early"] * times, "0")
    for start in range(1, times + 1):
        seen = 2 if moment.startswith("a rank") else 1
        job.wait_until("the moment", lambda: job.log().count(moment.format(start)) >= seen)  # noqa: B023
        job.scancel(*to)
        job.wait_until("the requeue", lambda: job.log().count(NOT_BEGUN) == start)  # noqa: B023
    assert job.end(60) == "COMPLETED", job.log()
    assert job.show("Restarts") == str(times)


def test_a_signal_before_the_ranks_act_on_signals_is_repeated_until_the_run_has_begun(
    stand_in: dict[str, str], tmp_path: Path
) -> None:
    job = submit_pretrain(stand_in, tmp_path / "out", "slow", "gain", "85", "0")
    job.wait_until("the ranks", lambda: job.log().count("a rank that handles signals") == 2)
    job.scancel("--batch", "--signal=USR1")
    job.wait_until("the second start", lambda: "start 2" in job.log())
    assert "saved; requeued, to resume from checkpoint step_00000000" in job.log()
    assert job.log().count("signals long after the start: 0") == 2
    assert job.end(60) == "COMPLETED"
    assert job.show("Restarts") == "1"


def test_a_signal_while_another_step_occupies_the_nodes_is_not_lost(stand_in: dict[str, str], tmp_path: Path) -> None:
    job = submit_pretrain(stand_in, tmp_path / "out", "occupy", "0")
    steps = ["scontrol", "show", "step", job.number, "-o"]
    job.wait_until("the wait", lambda: "State=PENDING" in run(steps, 20, stand_in).stdout)
    job.scancel("--batch", "--signal=USR1")
    assert job.end(60) == "COMPLETED"
    assert NOT_BEGUN in job.log()
    assert job.show("Restarts") == "1"


def test_only_the_task_of_an_array_that_was_signalled_is_requeued(stand_in: dict[str, str], tmp_path: Path) -> None:
    """The last task has the array's number as its SLURM_JOB_ID."""
    array = submit(stand_in, tmp_path / "out-%a", *TWO_BY_ONE, "--array=0-1", "slurm/pretrain.sh", "early", "0")
    other, last = (Job(f"{array.number}_{task}", stand_in, tmp_path / f"out-{task}") for task in (0, 1))
    for task in (other, last):
        task.wait_until("its ranks", lambda: task.log().count("a rank that handles no signal") == 2)  # noqa: B023
    assert last.show("JobId") == array.number
    last.scancel("--batch", "--signal=USR1")
    assert last.end(60) == "COMPLETED", last.log()
    assert (last.show("Restarts"), other.show("Restarts")) == ("1", "0")
    assert other.show("JobState") == "RUNNING"
    for task, number in (("0", other.number), ("1", last.number)):
        assert f"job {number}, start 1" in (tmp_path / f"out-{task}").read_text(encoding="utf-8")
        assert (tmp_path / f"run{task}" / "log" / f"slurm-{number}.out").samefile(tmp_path / f"out-{task}")
    assert (tmp_path / "run1" / "log" / f"requeues-{last.number}").exists()
    other.scancel()
