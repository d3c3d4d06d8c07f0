import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import bring_nodes_back, start_cluster

STAND_IN = """\
#!{python}
import os, pathlib, signal, subprocess, sys, time

run = pathlib.Path({run!r} + os.environ.get("SLURM_ARRAY_TASK_ID", ""))
restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
if sys.argv[1] == "job":
    if "occupy" in sys.argv and restart == 0:  # another step uses all resources of the job
        subprocess.Popen(["srun", "sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while "sleep" not in os.popen("squeue -hs -j $SLURM_JOB_ID").read():
            time.sleep(0.1)
    print(2, run)
    sys.exit(0)
rank = int(os.environ["SLURM_PROCID"])
if "world" in sys.argv:
    from mythos.ranks.world import read_world
    shares = [os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "SLURM_CPUS_PER_TASK")]
    print(read_world().describe(), "GPUs", shares[0], "CPUs", shares[1])
if sys.argv.count("early") > restart:  # handles no signal yet, as a rank whose Python starts
    print("a rank that handles no signal", flush=True)
    time.sleep(60)
received = []
if "slow" in sys.argv and restart == 0:  # handles signals and does not act on them, as a rank that still imports
    signal.signal(signal.SIGUSR1, lambda *_: received.append(time.monotonic()))
    print("a rank that handles signals", flush=True)
    while not received:
        time.sleep(0.05)
    time.sleep(3)
if not {{"unbegun", "occupy"}} & set(sys.argv):
    with open(run / "events.jsonl", "a") as file:
        print('{{"event": "started"}}', file=file)
started = time.monotonic()
if received:
    while time.monotonic() < started + 6.5:
        time.sleep(0.1)
    print("signals long after the start:", sum(at > started + 2.5 for at in received))
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that exits while the other one may still start
if "watch" in sys.argv and restart == 0:
    other = run / "rank_1"
    if rank == 1:
        other.write_text(os.environ["SLURMD_NODENAME"] + " " + str(os.getpid()), encoding="utf-8")
        time.sleep(120)
    while not other.exists() or pathlib.Path("/proc", other.read_text(encoding="utf-8").split()[1]).exists():
        time.sleep(0.1)
time.sleep(1)
latest = run / "checkpoints" / "latest"
if "gain" in sys.argv and rank == 0:
    latest.parent.mkdir(exist_ok=True)
    latest.write_text(f"step_{{restart:08d}}", encoding="utf-8")
codes = [word for word in sys.argv if word.isdecimal()]
sys.exit(int(codes[min(restart, len(codes) - 1)]))
"""


@pytest.fixture
def stand_in(tmp_path: Path, slurm_cluster: dict[str, str]) -> dict[str, str]:
    """The environment in which `mythos` ends with the codes among its arguments, one for each start of the job."""
    script = tmp_path / "bin" / "mythos"
    script.parent.mkdir()
    script.write_text(STAND_IN.format(python=sys.executable, run=str(tmp_path / "run")), encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return slurm_cluster | {"PATH": f"{script.parent}{os.pathsep}{slurm_cluster['PATH']}"}


@pytest.fixture
def nodes_come_back(slurm_cluster: dict[str, str]) -> Iterator[dict[str, str]]:
    """The cluster; after the test all its nodes are started again."""
    yield slurm_cluster
    try:
        bring_nodes_back(slurm_cluster)
    except AssertionError:
        start_cluster(slurm_cluster)  # a new one, so that the tests after this one have all nodes
        raise
