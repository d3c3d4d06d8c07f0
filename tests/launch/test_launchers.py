"""Processes under the real launchers: ranks find each other, exit codes are passed on, a dead rank ends the job."""

import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.cluster import clean_environment, run
from tests.require import missing, require

BIN = Path(sys.executable).parent
ALL_REDUCE = r"""
import sys

from mythos.ranks.world import read_world

with read_world() as world:
    world.export()
    import datetime

    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method="env://", timeout=datetime.timedelta(seconds=30))
    total = torch.tensor(world.rank)
    dist.all_reduce(total)
    sys.stdout.write(f"{world.describe()} sum {total.item()}\n")
    sys.stdout.flush()
    dist.destroy_process_group()
"""
# One argument for each rank: how it ends. No torch, to be fast. "together" waits for the others first, as ranks do that
# agreed to stop.
ENDS = r"""
import os
import pathlib
import signal
import sys
import time

from mythos.ranks.world import read_world

with read_world() as world:
    sys.stdout.write(f"{world.describe()}\n")
    sys.stdout.flush()
    word = sys.argv[1:][world.rank]
    if word.startswith("together"):
        word = word.removeprefix("together")
        here = pathlib.Path(__file__).parent
        (here / f"{world.rank}.here").touch()
        until = time.monotonic() + 15
        while len(list(here.glob("*.here"))) < world.world_size and time.monotonic() < until:
            time.sleep(0.01)
    if word.startswith("sleep"):
        time.sleep(float(word.removeprefix("sleep")))
        print(f"rank {world.rank} slept", flush=True)
    elif word == "raise":
        raise ValueError("boom")
    elif word == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        sys.exit(int(word))
"""


@pytest.fixture
def all_reduce(tmp_path: Path) -> Path:
    script = tmp_path / "all_reduce.py"
    script.write_text(ALL_REDUCE, encoding="utf-8")
    return script


@pytest.fixture
def ends(tmp_path: Path) -> Path:
    script = tmp_path / "ends.py"
    script.write_text(ENDS, encoding="utf-8")
    return script


def mpich() -> list[str]:
    """mpiexec of the mpich wheel, in the directory of this Python."""
    return [require(str(BIN / "mpiexec")), "-n", "2"]


def open_mpi() -> list[str]:
    """mpirun.openmpi on Debian; elsewhere an mpirun whose --version names Open MPI."""
    path = os.pathsep.join(part for part in os.environ["PATH"].split(os.pathsep) if Path(part) != BIN)
    found = shutil.which("mpirun.openmpi", path=path)
    if found is None:
        found = shutil.which("mpirun", path=path)
        if found is None or "Open MPI" not in run([found, "--version"], limit_s=20).stdout:
            missing("no mpirun of Open MPI on this machine")
    return [found, *(["--allow-run-as-root"] if os.getuid() == 0 else []), "--oversubscribe", "-n", "2"]


def torchrun() -> list[str]:
    return [require(str(BIN / "torchrun")), "--nproc-per-node=2", f"--master-port={20000 + os.getpid() % 10000}"]


PYTHON = [sys.executable]
SRUN = ["srun", "-N2", "--ntasks-per-node=2", "--kill-on-bad-exit=1", sys.executable]


def meets(command: list[str | Path], count: int, spoken: str, local: int, env: dict[str, str] | None = None) -> str:
    """Run the all-reduce; returns the address at which the ranks met."""
    done = run(command, limit_s=60, env=env)
    assert done.returncode == 0, done.stderr
    pattern = rf"{spoken}: rank (\d) of {count}, local rank (\d) of {local}, rendezvous (\S+):(\d+) sum (\d+)"
    found = re.findall(pattern, done.stdout)
    assert sorted(int(rank) for rank, *_ in found) == list(range(count)), done.stdout + done.stderr
    assert sorted(int(row[1]) for row in found) == sorted(list(range(local)) * (count // local))
    assert len({row[2:] for row in found}) == 1, "the ranks differ in address, port or sum"
    assert int(found[0][4]) == sum(range(count))
    return found[0][2]


def test_bare_meets(all_reduce: Path) -> None:
    assert meets([*PYTHON, all_reduce], 1, "1 process without a launcher", 1) == "127.0.0.1"


def test_torchrun_meets(all_reduce: Path) -> None:
    meets([*torchrun(), all_reduce], 2, "2 processes by torchrun", 2)


def test_mpich_meets(all_reduce: Path) -> None:
    assert meets([*mpich(), *PYTHON, all_reduce], 2, "2 processes by MPICH mpiexec", 2) == "127.0.0.1"


def test_open_mpi_meets_although_mpi4py_loads_another_mpi(all_reduce: Path) -> None:
    assert meets([*open_mpi(), *PYTHON, all_reduce], 2, "2 processes by Open MPI mpirun", 2) == "127.0.0.1"


def test_srun_meets(all_reduce: Path, slurm_cluster: dict[str, str]) -> None:
    address = meets([*SRUN, all_reduce], 4, "4 processes by srun", 2, slurm_cluster)
    assert address in ("node1", "127.0.1.1")  # the address where names do not resolve


def test_mpich_inside_a_slurm_job_is_not_mistaken_for_srun(ends: Path, slurm_cluster: dict[str, str]) -> None:
    mpiexec = [*mpich()[:-1], "4"]
    job = ["salloc", "-N2", "--ntasks-per-node=2", "--quiet"]
    done = run([*job, *mpiexec, *PYTHON, ends, "0", "0", "0", "0"], limit_s=30, env=slurm_cluster)
    assert done.returncode == 0, done.stderr
    for rank in range(4):
        line = f"4 processes by MPICH mpiexec: rank {rank} of 4, local rank {rank % 2} of 2, rendezvous "
        assert line in done.stdout, done.stdout
    assert len(set(re.findall(r"rendezvous (\S+)", done.stdout))) == 1


def test_a_batch_shell_is_bare(ends: Path, slurm_cluster: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    wrapped = f"{sys.executable} {ends} 0; srun {sys.executable} {ends} 0 0 0; echo the end"
    job: list[str | Path] = ["sbatch", "--parsable", "-N2", "-n3", "-o", log, "--wrap", wrapped]
    assert run(job, limit_s=20, env=slurm_cluster).returncode == 0
    until = time.monotonic() + 20
    while not (log.exists() and "the end" in log.read_text(encoding="utf-8")):
        assert time.monotonic() < until, log.read_text(encoding="utf-8") if log.exists() else "the job wrote nothing"
        time.sleep(0.1)
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("1 process without a launcher: rank 0 of 1")
    assert sum(line.startswith("3 processes by srun: rank ") for line in lines) == 3


# ---- how a job ends

LAUNCHERS = ["mpich", "open_mpi", "open_mpi_own_library", "torchrun", "srun"]


def launch(launcher: str, request: pytest.FixtureRequest) -> tuple[list[str], dict[str, str]]:
    """The command line before the script, and the environment, for two processes."""
    environ = clean_environment()
    if launcher == "srun":
        environ = request.getfixturevalue("slurm_cluster")
        return ["srun", "-N2", "-n2", "--kill-on-bad-exit=1", *PYTHON], environ
    if launcher == "torchrun":
        return torchrun(), environ
    if launcher == "mpich":
        return [*mpich(), *PYTHON], environ
    command = [*open_mpi(), *PYTHON]
    if launcher == "open_mpi_own_library":
        library = next(Path("/usr/lib").glob("*/libmpi.so.40"), None)
        if library is None:
            missing("no libmpi.so.40 of Open MPI on this machine")
        environ |= {"MPI4PY_MPIABI": "openmpi", "MPI4PY_LIBMPI": str(library)}
    return command, environ


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_exit_code_is_passed_on(launcher: str, ends: Path, request: pytest.FixtureRequest) -> None:
    command, environ = launch(launcher, request)
    done = run([*command, ends, "together85", "together85"], limit_s=30, env=environ)
    # torchrun returns its own exit codes
    assert done.returncode == (1 if launcher == "torchrun" else 85), done.stderr


@pytest.mark.parametrize(
    ("launcher", "way"),
    # torchrun starts slowly, so it is tested in one way only
    [
        (launcher, way)
        for launcher in LAUNCHERS
        for way in ("3", "raise", "kill")
        if launcher != "torchrun" or way == "3"
    ],
)
def test_a_dead_rank_ends_the_job(launcher: str, way: str, ends: Path, request: pytest.FixtureRequest) -> None:
    command, environ = launch(launcher, request)
    for words in (["sleep60", way], [way, "sleep60"]) if launcher == "mpich" else (["sleep60", way],):
        done = run([*command, ends, *words], limit_s=20, env=environ)
        assert done.returncode != 0
        assert "slept" not in done.stdout
        if way == "3" and launcher != "torchrun":
            # srun gives the largest code, and that is 128 + TERM of the rank that it ended
            assert done.returncode == (143 if launcher == "srun" else 3)


@pytest.mark.parametrize("launcher", ["mpich", "open_mpi_own_library", "srun"])
def test_a_rank_that_succeeds_before_the_others_ends_none_of_them(
    launcher: str, ends: Path, request: pytest.FixtureRequest
) -> None:
    command, environ = launch(launcher, request)
    done = run([*command, ends, "0", "sleep1.5"], limit_s=30, env=environ)
    assert done.returncode == 0, done.stderr
    assert "rank 1 slept" in done.stdout
