"""`sbatch slurm/pretrain.sh` on a real Slurm: after every disturbance the curve is that of the undisturbed run."""

import json
import os
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from launch.cli import main
from mythos.run.status import read_status
from tests import spawn
from tests.cluster import REPO, SCRIPT, run
from tests.slurm.jobs import LIMIT_S, TWO_BY_ONE, TWO_BY_TWO, Job, losses, submit
from tests.tiny import SEQUENCE_LENGTH

SHIPPED = (str(REPO / "configs/model/tiny-looped-moe.yaml"), str(REPO / "configs/run/demo.yaml"))
STEPS = 24


def options(data: Path, run_directory: Path, **overrides: object) -> list[str]:
    """The shipped demo with the tests' data, and with expert parallelism 2 on one machine and on two nodes alike."""
    values = {
        "run.directory": run_directory,
        "data.directory": data,
        "data.sequence_length": SEQUENCE_LENGTH,
        "model.width": 64,
        "parallel.expert_parallel_size": 2,
        "train.steps": STEPS,
        "train.micro_batch_sequences": 8,
        "loop.mean_depth": 2,
        "checkpoint.every": 8,
        "eval.every": 12,
        "eval.sequences": 4,
        "eval.depths": "[1,2]",
        "sample.tokens": 0,
    }
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return [*SHIPPED, *(f"{name}={value}" for name, value in values.items())]


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The curve of two processes on one machine, without Slurm."""
    return without_slurm(2, tiny_data, tmp_path_factory.mktemp("undisturbed"))


def without_slurm(ranks: int, data: Path, directory: Path) -> list[tuple[int, float]]:
    job = spawn.Job(ranks, main, ["train", *options(data, directory / "run")], output=directory / "output")
    try:
        assert job.wait(LIMIT_S) == 0, job.text()
    finally:
        job.kill()
    assert [step for step, _ in losses(directory / "run")] == list(range(1, STEPS + 1))
    return losses(directory / "run")


def pretrain(environ: dict[str, str], tmp_path: Path, shape: tuple[str, ...], *words: str) -> Job:
    return submit(environ, tmp_path / "job.out", *shape, "slurm/pretrain.sh", *words)


def scontrol(environ: dict[str, str], *words: str) -> None:
    done = run(["scontrol", *words], 20, environ)
    assert done.returncode == 0, done.stderr


def test_two_nodes_give_the_curve_of_one_machine_and_the_checkpoints_are_evaluated_in_an_array(
    tiny_data: Path, tmp_path: Path, slurm_cluster: dict[str, str]
) -> None:
    directory = tmp_path / "run"
    (tmp_path / "one_machine").mkdir()
    expected = without_slurm(4, tiny_data, tmp_path / "one_machine")
    job = pretrain(slurm_cluster, tmp_path, TWO_BY_TWO, *options(tiny_data, directory))
    assert job.end() == "COMPLETED", job.log()
    assert losses(directory) == expected
    assert "4 processes by srun: rank 0 of 4, local rank 0 of 2" in job.log()
    assert len(re.findall(r"^rank \d on node[1-4]: cpu, python .*, torch .*, deepspeed ", job.log(), re.M)) == 4
    assert "across 2 nodes" not in job.log(), "the experts of a group are on one node"
    assert (directory / "log" / f"slurm-{job.number}.out").samefile(job.output)
    status = read_status(directory)
    assert (status.state, status.step, status.slurm_jobs, status.slurm_restarts) == ("finished", STEPS, [job.number], 0)

    output = tmp_path / "eval-%a.out"
    array = submit(
        slurm_cluster, output, *TWO_BY_ONE, "--array=1-4", "slurm/eval.sh", str(directory), "all", "eval.sequences=4"
    )
    for index in (1, 2, 3, 4):
        part = Job(f"{array.number}_{index}", slurm_cluster, tmp_path / f"eval-{index}.out")
        assert part.end() == "COMPLETED", part.log()
    assert "nothing to do for index 4: 3 checkpoints" in part.log()
    found = {
        path.stem.rpartition("_")[0]: json.loads(path.read_text(encoding="utf-8"))
        for path in (directory / "evaluations").glob("*.json")
    }
    assert sorted(found) == ["step_00000012", "step_00000016", "step_00000024"], "the one before the decay is kept"
    for path in (directory / "evaluations").glob("*.npz"):
        load_LTE = np.load(path)["expert_load"]
        assert load_LTE.shape == (1, 2, 8)
        assert load_LTE.sum(axis=-1) == pytest.approx(np.ones((1, 2)))
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [line for line in lines if "val/loss_depth_2" in line][-1]
    for name in ("val/loss_depth_1", "val/loss_depth_2"):  # on half as many ranks
        assert found["step_00000024"][name] == pytest.approx(last[name], rel=1e-5)


def test_usr1_saves_requeues_and_the_curve_is_the_undisturbed_one_bit_for_bit(
    undisturbed: list[tuple[int, float]], tiny_data: Path, tmp_path: Path, slurm_cluster: dict[str, str]
) -> None:
    """Also while another service is at the port that follows from the job's number."""
    directory = tmp_path / "run"
    job = pretrain(slurm_cluster, tmp_path, (*TWO_BY_ONE, "--hold"), *options(tiny_data, directory))
    port = 20000 + int(job.number) % 10000
    with socket.create_server(("", port)):
        scontrol(slurm_cluster, "release", job.number)
        job.wait_for_step(directory, 4)
    assert f"port {port} is in use on this host: the ranks meet at port " in job.log()
    assert read_status(directory).state == "running"
    job.scancel("--batch", "--signal=USR1")
    job.wait_until("the requeue", lambda: "requeued" in job.log())
    assert read_status(directory).state in ("preempted", "running")
    assert job.end() == "COMPLETED", job.log()
    assert job.show("Restarts") == "1"
    assert "start 1, " in job.log(), "the log of the first attempt is kept"
    assert "start 2, " in job.log()
    saved = int(re.search(r"stop requested \(SIGUSR1\): saved at step (\d+)", job.log()).group(1))  # type: ignore[union-attr]
    assert 4 <= saved < STEPS
    assert losses(directory) == undisturbed
    events = EventAccumulator(str(directory))
    events.Reload()
    points = [(point.step, pytest.approx(point.value, rel=1e-6)) for point in events.Scalars("train/loss")]
    assert points == undisturbed
    status = read_status(directory)
    assert (status.state, status.attempts, status.slurm_jobs, status.slurm_restarts) == ("finished", 2, [job.number], 1)


def test_a_run_that_is_requeued_and_loses_nodes_finishes_with_the_same_curve(
    undisturbed: list[tuple[int, float]], tiny_data: Path, tmp_path: Path, nodes_come_back: dict[str, str]
) -> None:
    directory, environ = tmp_path / "run", nodes_come_back
    words = options(tiny_data, directory, checkpoint__every=3)
    job = pretrain(environ, tmp_path, TWO_BY_ONE, *words)
    job.wait_for_step(directory, 3)
    scontrol(environ, "requeue", job.number)
    job.wait_until("the second start", lambda: "start 2, " in job.log())
    job.wait_for_step(directory, 6)
    scontrol(environ, "update", "NodeName=node2", "State=DOWN", "Reason=test")
    job.wait_until("the third start", lambda: "start 3, " in job.log())
    job.wait_for_step(directory, 9)
    lost = re.findall(r"^rank 1 on (node\d)", job.log(), re.M)[-1]
    assert run([SCRIPT, "kill-node", lost], 20, environ).returncode == 0
    assert job.end() == "COMPLETED", job.log()
    assert job.show("Restarts") == "3"
    assert losses(directory) == undisturbed
    assert read_status(directory).attempts == 4


def test_with_a_range_of_nodes_the_run_resumes_on_those_that_remain(
    undisturbed: list[tuple[int, float]], tiny_data: Path, tmp_path: Path, nodes_come_back: dict[str, str]
) -> None:
    directory, environ = tmp_path / "run", nodes_come_back
    shape = ("--nodes=2-4", *TWO_BY_ONE[1:])
    job = pretrain(environ, tmp_path, shape, *options(tiny_data, directory, checkpoint__every=3))
    job.wait_for_step(directory, 4)
    assert "start 1, 4 nodes x 1 tasks" in job.log()
    assert run([SCRIPT, "kill-node", "node4"], 20, environ).returncode == 0
    # Slurm does this by itself half a minute later.
    scontrol(environ, "update", "NodeName=node4", "State=DOWN", "Reason=test")
    assert job.end() == "COMPLETED", job.log()
    assert "uses 2 of 3 nodes: the global batch cannot be divided over more" in job.log()
    assert "start 2, 2 nodes x 1 tasks" in job.log()
    assert "was written with another layout (ranks 4 -> 2)" in job.log()
    assert losses(directory) == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in undisturbed]


def test_a_killed_rank_fails_the_job_which_is_not_requeued_and_the_cause_is_reported(
    tiny_data: Path, tmp_path: Path, slurm_cluster: dict[str, str]
) -> None:
    directory = tmp_path / "run"
    job = pretrain(slurm_cluster, tmp_path, TWO_BY_ONE, *options(tiny_data, directory))
    job.wait_for_step(directory, 3)
    log = (directory / "log" / "rank_00001.log").read_text(encoding="utf-8")
    os.kill(int(re.findall(r"process (\d+)", log)[-1]), signal.SIGKILL)
    assert job.end() == "FAILED"
    assert job.show("Restarts") == "0"
    assert job.show("ExitCode") != "0:0"
    status = read_status(directory)
    assert status.state == "failed"
    assert re.search(r"rank 1 on node\d \(process \d+\) died: it was killed", status.cause or "")


def test_a_bad_configuration_fails_at_once_and_is_not_requeued(
    tiny_data: Path, tmp_path: Path, slurm_cluster: dict[str, str]
) -> None:
    words = options(tiny_data, tmp_path / "run", train__stepz=3)
    job = pretrain(slurm_cluster, tmp_path, TWO_BY_TWO, *words)
    assert job.end(20) == "FAILED"
    assert (job.show("ExitCode"), job.show("Restarts")) == ("2:0", "0")
    assert "train.stepz = 3: unknown option; did you mean train.steps?" in job.log()
    assert not (tmp_path / "run").exists()


def test_starts_that_fail_end_with_code_2_and_status_reports_the_cause(
    tiny_data: Path, tmp_path: Path, slurm_cluster: dict[str, str]
) -> None:
    def start(name: str, data: Path, **variables: str) -> Job:
        words = ("slurm/pretrain.sh", *options(data, tmp_path / name))
        return submit(slurm_cluster | variables, tmp_path / f"{name}.out", *TWO_BY_ONE, *words)

    with socket.create_server(("", 0)) as service:
        port = str(service.getsockname()[1])
        taken = start("taken", tiny_data, MASTER_PORT=port)
        unresolved = start("unresolved", tiny_data, MASTER_ADDR="no-such-host.invalid")
        missing = start("missing", Path("/nowhere"))
        assert [job.end(60) for job in (taken, unresolved, missing)] == ["FAILED"] * 3
    assert re.search(r"rank \d on node\d: MASTER_ADDR = 'no-such-host.invalid' does not resolve here", unresolved.log())
    assert missing.log().count("/nowhere/manifest.json: no such file") == 1
    assert [job.show("ExitCode") for job in (taken, unresolved, missing)] == ["2:0"] * 3
    causes = {
        "taken": f"MASTER_PORT = {port}: cannot be opened on this host (Address already in use)",
        "unresolved": "MASTER_ADDR = 'no-such-host.invalid' does not resolve here",
        "missing": "/nowhere/manifest.json: no such file",
    }
    for name, cause in causes.items():
        status = read_status(tmp_path / name)
        assert status.state == "failed"
        assert cause in str(status.cause)
