"""`mythos train` as a user runs it: real processes under every launcher, real signals, real kills."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from mythos.config.load import to_dict
from mythos.run.journal import read_attempts
from mythos.run.metrics import read_metrics
from tests import spawn
from tests.cluster import clean_environment, run
from tests.data.conftest import write_data_set
from tests.require import missing, require
from tests.tiny import VOCABULARY, tiny_config

BIN = Path(sys.executable).parent
MYTHOS = BIN / "mythos"
LIMIT_S = 150


def write_config(path: Path, data: Path, ranks: int = 2, **overrides: Any) -> Path:
    options: dict[str, Any] = {"train__steps": 12, "checkpoint__every": 5, "eval__every": 6}
    options["parallel__expert_parallel_size"] = ranks  # the same on one machine and on two nodes
    config = tiny_config("looped-moe", data, path.parent / "run", ranks=ranks, **(options | overrides))
    path.write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    return path


def losses(run_directory: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run_directory) if "train/loss" in line]


@pytest.fixture(scope="module")
def mpiexec_losses(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    directory = tmp_path_factory.mktemp("mpiexec")
    done = run([BIN / "mpiexec", "-n", "2", MYTHOS, "train", write_config(directory / "c.yaml", tiny_data)], LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert "2 processes by MPICH mpiexec: rank 0 of 2" in done.stderr
    assert done.stderr.count("run directory: ") == 1, "rank 0 reports for all"
    found = losses(directory / "run")
    assert len(found) == 12
    return found


def test_torchrun_gives_the_same_curve(mpiexec_losses: list[float], tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_data)
    done = run([BIN / "torchrun", "--nproc-per-node=2", "--no-python", MYTHOS, "train", config], LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == mpiexec_losses


def test_open_mpi_gives_the_same_curve(mpiexec_losses: list[float], tiny_data: Path, tmp_path: Path) -> None:
    mpirun = next((path for path in ("/usr/bin/mpirun.openmpi", "/usr/bin/orterun") if Path(path).exists()), None)
    if mpirun is None:
        missing("no Open MPI (openmpi-bin) on this machine")
    command = [mpirun, "--oversubscribe", "-n", "2", MYTHOS, "train", write_config(tmp_path / "c.yaml", tiny_data)]
    if os.getuid() == 0:
        command.insert(1, "--allow-run-as-root")
    done = run(command, LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert "2 processes by Open MPI mpirun" in done.stderr
    assert losses(tmp_path / "run") == mpiexec_losses


def test_srun_over_two_nodes_gives_the_same_curve(
    mpiexec_losses: list[float], tiny_data: Path, tmp_path: Path, slurm_cluster: dict[str, str]
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_data)
    command = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", MYTHOS, "train", config]
    done = run(command, LIMIT_S, env=slurm_cluster)
    assert done.returncode == 0, done.stderr
    assert "2 processes by srun: rank 0 of 2, local rank 0 of 1" in done.stderr
    assert losses(tmp_path / "run") == mpiexec_losses


def test_a_bare_process_gives_the_curve_within_rounding(
    mpiexec_losses: list[float], tiny_data: Path, tmp_path: Path
) -> None:
    done = run([MYTHOS, "train", write_config(tmp_path / "c.yaml", tiny_data, ranks=1)], LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(mpiexec_losses, rel=1e-5)
    assert [attempt["ranks"] for attempt in read_attempts(tmp_path / "run")] == [1]


class Job:
    """A run under mpiexec in the background; wait for some steps, then disturb it."""

    def __init__(self, config: Path) -> None:
        self.run_directory = config.parent / "run"
        self.process = subprocess.Popen(
            [BIN / "mpiexec", "-n", "2", MYTHOS, "train", config],
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            start_new_session=True,
        )

    def wait_for_step(self, step: int) -> None:
        until = time.monotonic() + LIMIT_S
        while time.monotonic() < until:
            if any(line["step"] >= step and "train/loss" in line for line in read_metrics(self.run_directory)):
                return
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.02)
        self.end()
        raise AssertionError(f"step {step} was not reached in {LIMIT_S} s")

    def rank_process(self, rank: int) -> int:
        log = (self.run_directory / "log" / f"rank_{rank:05d}.log").read_text(encoding="utf-8")
        return int(re.findall(r"process (\d+)", log)[-1])

    def finish(self) -> tuple[int, str]:
        try:
            output, _ = self.process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"the job did not end in {LIMIT_S} s") from None
        return self.process.returncode, output

    def end(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(timeout=30)


def resume(config: Path) -> str:
    """Start a run again, on forked ranks without a launcher, which must end well; returns its output."""
    job = spawn.Job(2, main, ["train", str(config)], output=config.parent / "output")
    try:
        assert job.wait(LIMIT_S) == 0, job.text()
    finally:
        job.kill()
    return job.text()


STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    directory = tmp_path_factory.mktemp("undisturbed")
    config = write_config(directory / "c.yaml", tiny_data, train__steps=STEPS, checkpoint__every=10)
    resume(config)
    return losses(directory / "run")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_exits_85_and_the_next_start_resumes(
    name: str, undisturbed: list[float], tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_data, train__steps=STEPS, checkpoint__every=1000)
    job = Job(config)
    job.wait_for_step(7)
    if name == "Ctrl-C":  # a terminal sends it to the launcher and to all ranks
        os.killpg(job.process.pid, signal.SIGINT)
    else:
        os.kill(job.rank_process(1), signal.Signals[name])
    code, output = job.finish()
    assert code == 85, output
    saved = int(re.search(r"stop requested \(.*\): saved at step (\d+)", output).group(1))  # type: ignore[union-attr]
    assert 7 <= saved < STEPS
    assert len(losses(tmp_path / "run")) == saved

    assert f"resumed from {tmp_path}/run/checkpoints/step_{saved:08d} at step {saved}" in resume(config)
    assert losses(tmp_path / "run") == undisturbed


@pytest.mark.parametrize(("name", "early"), [("SIGUSR1", True), ("SIGUSR1", False), ("SIGTERM", False)])
def test_a_signal_before_the_ranks_have_met_ends_the_process_soon(
    name: str, early: bool, tiny_data: Path, tmp_path: Path
) -> None:
    """Rank 0 waits for rank 1, which never starts; or it has not even imported torch."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place["MASTER_PORT"] = str(probe.getsockname()[1])
    command = [MYTHOS, "train", write_config(tmp_path / "c.yaml", tiny_data)]
    process = subprocess.Popen(command, env=clean_environment() | place, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        proc, until = Path("/proc") / str(process.pid), time.monotonic() + 60
        while not catches(proc, signal.SIGUSR1) or (not early and not listens(proc, int(place["MASTER_PORT"]))):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.005)
        assert ("libtorch" in (proc / "maps").read_text(encoding="utf-8")) != early
        process.send_signal(signal.Signals[name])
        _, reported = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 85, reported
    assert f"stop requested ({name}) before the run began" in reported


def catches(proc: Path, number: signal.Signals) -> bool:
    mask = re.search(r"^SigCgt:\s*(\w+)", (proc / "status").read_text(encoding="utf-8"), re.M)
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


def listens(proc: Path, port: int) -> bool:
    return f":{port:04X} " in (proc / "net" / "tcp6").read_text(encoding="utf-8") + (proc / "net" / "tcp").read_text(
        encoding="utf-8"
    )


def test_a_killed_rank_ends_the_job_and_the_next_start_resumes(
    undisturbed: list[float], tiny_data: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_data, train__steps=STEPS, checkpoint__every=10)
    job = Job(config)
    job.wait_for_step(13)
    os.kill(job.rank_process(1), signal.SIGKILL)
    code, output = job.finish()
    assert code not in (0, 2, 85), output

    assert "at step 10 of 30" in resume(config)
    assert losses(tmp_path / "run") == undisturbed
    assert len(read_attempts(tmp_path / "run")) == 2

    assert "the run is finished at step 30" in resume(config)


def test_bad_input_ends_with_code_2_and_is_reported_once(tiny_data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", tiny_data)
    mpiexec = [BIN / "mpiexec", "-n", "2", MYTHOS, "train", config]

    done = run([*mpiexec, "train.stepz=3", "train.global_batch_sequences=3"], 60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("train.stepz = 3: unknown option; did you mean train.steps?") == 1
    assert done.stderr.count("train.global_batch_sequences = 3: must be a multiple of") == 1
    assert "Traceback" not in done.stderr

    done = run([*mpiexec, "data.directory=/nowhere"], 60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("/nowhere/manifest.json: no such file") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "a run that cannot start creates nothing"

    done = run([*mpiexec, "data.sequence_length=16"], 60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("data.sequence_length = 16: ") == 1


def test_a_damaged_shard_ends_the_job_with_its_name(tmp_path: Path) -> None:
    data = write_data_set(tmp_path / "data", VOCABULARY)
    shard = sorted((data / "train").glob("shard.*.mds"))[0]  # read by rank 1 only, at the first step
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    done = run([BIN / "mpiexec", "-n", "2", MYTHOS, "train", write_config(tmp_path / "c.yaml", data)], LIMIT_S)
    assert done.returncode not in (0, 85), done.stderr
    assert f"{shard}: damaged, its hash differs from the index" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_gpu_is_one_line(tiny_data: Path, tmp_path: Path) -> None:
    command = [MYTHOS, "train", write_config(tmp_path / "c.yaml", tiny_data, ranks=1), "device=cuda"]
    done = run(command, 60, clean_environment() | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2
    assert "device = 'cuda': this rank needs GPU 0 of its node, which has 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_and_config(tiny_data: Path, tmp_path: Path) -> None:
    for command, expected in (
        (["--help"], "Exit codes: 0 done, 2 bad input, 74"),
        (["train", "--help"], "mpiexec -n 2"),
    ):
        done = run([MYTHOS, *command], 30)
        assert done.returncode == 0
        assert expected in done.stdout
    done = run([MYTHOS, "config", write_config(tmp_path / "c.yaml", tiny_data), "--ranks", "2", "seed=5"], 30)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["seed"] == 5
    assert run([MYTHOS, "config", tmp_path / "c.yaml", "--ranks", "3"], 30).returncode == 2
    assert require(str(MYTHOS))
