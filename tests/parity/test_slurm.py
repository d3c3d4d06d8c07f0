"""slurm/parity.sh on a real Slurm: job arrays, and what is submitted again after faults in mid-experiment."""

import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mythos.run.journal import read_events
from tests.cluster import SCRIPT, bring_nodes_back, local_slurm, run
from tests.faults.damage import full_disk, small_disk
from tests.parity.conftest import report_of, write_smoke_experiment
from tests.require import missing, require
from tests.slurm.jobs import Job

LIMIT_S = 400
ARMS = ("looped", "small", "large")
MISSING = {"looped": "1", "small": "1,2", "large": "2"}
ALONE_ON_A_NODE = ("--nodes=1", "--gpus-per-node=1", "--cpus-per-gpu=200")
DISK_MEGABYTES = 160
ON_A_NODE = "--gpus-per-node=1 --cpus-per-gpu=100"


@pytest.fixture
def environ(undisturbed: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Slurm for an experiment of which two runs are finished, and whose arm `large` has a disk of its own."""
    for command in ("munged", "slurmctld", "slurmd"):
        require(command)
    with ExitStack() as stack:
        (tmp_path / "runs").mkdir()
        try:
            stack.enter_context(small_disk(tmp_path / "runs/large", DISK_MEGABYTES))
        except OSError as error:
            missing(str(error))
        for finished in ("looped/seed-2", "large/seed-1"):
            shutil.copytree(undisturbed / finished, tmp_path / "runs" / finished)
        # Nodes have mounts of their own, those of the time when they start.
        directory = Path(tempfile.mkdtemp(prefix="mythos-slurm-", dir="/tmp"))
        environ = stack.enter_context(local_slurm(directory))
        environ["EVAL_OPTIONS"] = f"{ON_A_NODE} --output={tmp_path}/eval-%A_%a"
        environ["REPORT_OPTIONS"] = f"--output={tmp_path}/report"
        yield environ


def submitted(said: str) -> dict[str, str]:
    """The number of each job by its name and seeds."""
    return dict(re.findall(r"^parity.sh: faults/(\S+(?:, seeds \S+)?): job (\d+)$", said, re.MULTILINE))


def wait_for_queue(environ: dict[str, str], pattern: str, wanted: bool) -> None:
    """Wait until a line `ARRAY_TASK STATE NAME` of the queue matches, or none does."""
    until = time.monotonic() + LIMIT_S
    while bool(re.search(pattern, queue := queue_of(environ), re.MULTILINE)) != wanted:
        assert time.monotonic() < until, queue
        time.sleep(0.2)


def queue_of(environ: dict[str, str]) -> str:
    return run(["squeue", "--noheader", "--array", "--format=%F_%K %T %j"], 20, environ).stdout


def freeze_at_the_first_checkpoint(runs: dict[str, Path]) -> dict[str, int]:
    """Stop the processes of these runs when their first checkpoint is complete; returns their numbers."""
    frozen: dict[str, int] = {}
    until = time.monotonic() + LIMIT_S
    while len(frozen) < len(runs):
        assert time.monotonic() < until, f"frozen: {list(frozen)}"
        for name in runs.keys() - frozen:
            if (runs[name] / "checkpoints/step_00000002/state.json").exists():
                frozen[name] = read_events(runs[name])[-1]["process"]
                os.kill(frozen[name], signal.SIGSTOP)
        time.sleep(0.01)
    return frozen


def test_after_a_kill_a_lost_node_and_a_full_disk_the_report_is_that_of_an_undisturbed_experiment(
    environ: dict[str, str], workspace: Path, undisturbed: Path, tmp_path: Path
) -> None:
    path = write_smoke_experiment(tmp_path)
    text = path.read_text(encoding="utf-8").replace("name: smoke\n", "name: faults\n")
    path.write_text(re.sub(r"  looped-equal-flops:\n(    .*\n)+", "", text), encoding="utf-8")

    (tmp_path / "no_torch").mkdir()
    (tmp_path / "no_torch/torch.py").write_text("raise ImportError", encoding="utf-8")
    without_torch = {"PYTHONPATH": f"{tmp_path}/no_torch{os.pathsep}{environ['PYTHONPATH']}"}

    def submit(*options: str) -> str:
        output = f"--output={tmp_path}/train-%A_%a"
        own = environ | without_torch if "--dry-run" in options else environ
        done = run(["slurm/parity.sh", path, *ALONE_ON_A_NODE, output, *options], 120, own, workspace)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    planned = submit("--dry-run").splitlines()
    missing_jobs = [f"{arm}/{job}, seeds {MISSING[arm]}" for arm in ARMS for job in ("train", "eval")] + ["report"]
    assert planned[:7] == [f"faults/{job}" for job in missing_jobs]
    assert planned[-2].startswith("4 runs: ")
    assert not queue_of(environ)
    jobs = submitted(submit())
    assert list(jobs) == missing_jobs
    tasks = [f"{jobs[name]}_{seed}" for name, seed in zip(missing_jobs, (1, 1, 1, 1, 2, 2), strict=False)]
    looped, small, large = tasks[::2]

    runs = {task: tmp_path / f"runs/{arm}/seed-{task[-1]}" for arm, task in zip(ARMS, tasks[::2], strict=True)}
    pids = freeze_at_the_first_checkpoint(runs)
    fill_disk, free_space = full_disk(runs[large])
    fill_disk()
    os.kill(pids[large], signal.SIGCONT)
    os.kill(pids[small], signal.SIGKILL)
    node = Job(looped, environ, path).show("NodeList")
    lost = ["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost"]
    for command in ([SCRIPT, "kill-node", node], lost):  # Slurm itself needs half a minute
        assert run(command, 20, environ).returncode == 0
    for task in tasks[2:]:  # with the training that fails its evaluation ends
        wait_for_queue(environ, rf"^{task} ", False)
    assert "checkpoint.max_failures" in (tmp_path / f"train-{large}").read_text(encoding="utf-8")
    free_space()

    said = submit()
    again = ["small/train, seeds 1", "small/eval, seeds 1", "large/train, seeds 2", "large/eval, seeds 2", "report"]
    assert list(submitted(said)) == again
    assert re.search(r"^parity.sh: \d tasks are in the queue and are left alone$", said, re.MULTILINE)
    bring_nodes_back(environ)
    wait_for_queue(environ, ".", False)
    job = Job(looped, environ, tmp_path / f"train-{looped}")
    # Slurm repeats the kill of the lost start until it arrives, which may be when the job runs again on the same node.
    assert job.show("Restarts") in ("1", "2"), job.log()
    assert job.show("JobState") == "COMPLETED", job.log()
    assert "parity.sh: everything is finished" in submit()
    report, other = report_of(tmp_path / "runs"), report_of(undisturbed)
    assert report["decision"] == other["decision"]
    assert report["arms"] == {arm: other["arms"][arm] for arm in ARMS}
