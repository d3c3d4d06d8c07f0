"""A real Slurm for tests, and commands with a time limit.

In tests/conftest.py:      from tests.cluster import slurm_cluster  # noqa: F401
In a test:

    from tests.cluster import run

    def test_it(slurm_cluster: dict[str, str]) -> None:
        done = run(["srun", "-N2", "hostname"], limit_s=20, env=slurm_cluster)
        assert done.returncode == 0, done.stderr

The fixture starts one cluster (node1 to node4, two simulated GPUs each) for the whole test session, in a directory
and on ports of its own, and yields the environment for sbatch, srun, scontrol and slurm/local_cluster.sh (for
kill-node and start-node). A test that takes a node down must start it again. Jobs of other
tests may be in the queue, so a test looks only at the ids of its own jobs.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.require import require

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "slurm" / "local_cluster.sh"
NODES = 4
LAUNCHER_PREFIXES = ("SLURM_", "SBATCH_", "PMI", "MPI_LOCAL", "OMPI_", "TORCHELASTIC_", "LOCAL_")
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def clean_environment() -> dict[str, str]:
    """This environment without a launcher's variables (the tests may run inside a job); Python finds the repo first."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(LAUNCHER_PREFIXES) and name not in LAUNCHER_NAMES
    }
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), environ.get("PYTHONPATH")]))
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    environ["OMP_NUM_THREADS"] = "1"
    return environ


def run(
    command: Sequence[str | Path], limit_s: float, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command with captured output. After the limit it is killed with all its children, and the test fails."""
    process = subprocess.Popen(
        [str(word) for word in command],
        env=dict(env) if env is not None else clean_environment(),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except BaseException as error:
        # TERM first: srun and mpiexec then end their tasks, which have sessions of their own.
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        with suppress(subprocess.TimeoutExpired):  # a surviving task may hold the pipes open
            process.communicate(timeout=5)
        raise AssertionError(f"not done after {limit_s} s: {' '.join(map(str, command))}") from error
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def _free_ports(count: int) -> int:
    """The first of ``count`` consecutive free TCP ports; each test session starts to search at another port."""
    for attempt in range(100):
        first = 10000 + (os.getpid() + attempt) % 450 * 20
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports between 10000 and 19000")


def start_cluster(environ: dict[str, str]) -> None:
    """Start the cluster; one that runs already is left as it is, unless nodes of it are not up."""
    up = run([SCRIPT, "up", str(NODES)], limit_s=60, env=environ)
    assert up.returncode == 0, f"slurm/local_cluster.sh up failed:\n{up.stdout}{up.stderr}"


@contextmanager
def local_slurm(directory: Path) -> Iterator[dict[str, str]]:
    """The environment of a running Slurm of four nodes in a short directory; taken down at the end of the block."""
    environ = clean_environment()
    environ["SLURM_LOCAL_DIR"] = str(directory)
    environ["SLURM_LOCAL_PORT"] = str(_free_ports(NODES + 1))
    environ["SLURM_CONF"] = f"{directory}/slurm.conf"
    try:
        start_cluster(environ)
        yield environ
    finally:
        run([SCRIPT, "down"], limit_s=60, env=environ)
        shutil.rmtree(directory, ignore_errors=True)


def bring_nodes_back(environ: dict[str, str]) -> None:
    """Start the nodes of the cluster whose slurmd does not run, and resume those that Slurm took out of service."""
    until = time.monotonic() + 60
    while (status := run([SCRIPT, "status"], 20, environ)).returncode:
        states = run(["scontrol", "show", "node", "-o"], 20, environ).stdout
        assert time.monotonic() < until, f"the nodes are not up again\n{status.stderr}{states}"
        for number in range(1, NODES + 1):
            run([SCRIPT, "start-node", f"node{number}"], 20, environ)
        for node in re.findall(r"NodeName=(\S+).* State=\S*(?:DOWN|DRAIN|FAIL)", states):
            run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], 20, environ)
        time.sleep(1)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[dict[str, str]]:
    """The environment of a running Slurm of four nodes, which is taken down when the session ends."""
    for command in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol"):
        require(command)
    # short: at most 107 characters in a socket's path
    with local_slurm(Path(tempfile.mkdtemp(prefix="mythos-slurm-", dir="/tmp"))) as environ:
        yield environ
