"""What the batch scripts decide, on the real Slurm, with a stand-in for `mythos` that ends as it is told."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster import REPO, run
from tests.require import require
from tests.slurm.jobs import TWO_BY_ONE, Job, submit

STAND_IN = """\
#!{python}
import os, pathlib, signal, sys, time

run = pathlib.Path({run!r})
if sys.argv[1] == "job":
    print(2, run)
    sys.exit(0)
latest = run / "checkpoints" / "latest"
if "slow" in sys.argv:  # hears no signal at first, as a rank that still imports
    time.sleep(3)
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    while not heard:
        time.sleep(0.05)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as a rank that leaves; the other one may still start
time.sleep(1)
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
if "gain" in sys.argv and os.environ["SLURM_PROCID"] == "0":
    latest.parent.mkdir(exist_ok=True)
    latest.write_text("step_0000000" + restart)
codes = [word for word in sys.argv if word.isdecimal()]
sys.exit(int(codes[min(int(restart), len(codes) - 1)]))
"""


@pytest.fixture
def stand_in(tmp_path: Path, slurm_cluster: dict[str, str]) -> dict[str, str]:
    """The environment in which `mythos` ends with the codes among its arguments, one a life of the job."""
    script = tmp_path / "bin" / "mythos"
    script.parent.mkdir()
    script.write_text(STAND_IN.format(python=sys.executable, run=str(tmp_path / "run")))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return slurm_cluster | {"PATH": f"{script.parent}{os.pathsep}{slurm_cluster['PATH']}"}


def pretrain(environ: dict[str, str], output: Path, *words: str) -> Job:
    return submit(environ, output, *TWO_BY_ONE, "slurm/pretrain.sh", *words)


def test_requeues_end_at_the_limit(stand_in: dict[str, str], tmp_path: Path) -> None:
    job = pretrain(stand_in | {"MAX_REQUEUES": "1"}, tmp_path / "out", "gain", "85")
    assert job.end(60) == "FAILED"
    assert (job.show("Restarts"), job.show("ExitCode")) == ("1", "85:0")
    assert "not requeued: MAX_REQUEUES (1) reached" in job.log()


def test_no_requeue_when_no_step_was_gained(stand_in: dict[str, str], tmp_path: Path) -> None:
    job = pretrain(stand_in, tmp_path / "out", "85")
    assert job.end(60) == "FAILED"
    assert (job.show("Restarts"), job.show("ExitCode")) == ("1", "85:0")
    assert "not requeued: no step was gained since the last time (checkpoint none)" in job.log()


def test_a_signal_before_the_ranks_can_hear_it_is_not_lost(stand_in: dict[str, str], tmp_path: Path) -> None:
    job = pretrain(stand_in, tmp_path / "out", "slow", "gain", "85", "0")
    job.wait_until("the start", lambda: "start 1" in job.log())
    job.scancel("--batch", "--signal=USR1")
    job.wait_until("the second life", lambda: "start 2" in job.log())
    assert "saved at step_00000000, requeued" in job.log()
    job.scancel("--batch", "--signal=USR1")
    assert job.end(60) == "COMPLETED"
    assert job.show("Restarts") == "1"


@pytest.mark.parametrize("code", ["1", "7"])
def test_a_crash_is_not_requeued_and_its_code_comes_through(
    code: str, stand_in: dict[str, str], tmp_path: Path
) -> None:
    job = pretrain(stand_in, tmp_path / "out", code)
    assert job.end(60) == "FAILED"
    assert (job.show("Restarts"), job.show("ExitCode")) == ("0", f"{code}:0")
    assert "does not answer" not in job.log()
    log = next((tmp_path / "run" / "log").glob("slurm-*.out"))
    assert log.samefile(tmp_path / "out"), "the same file under the run directory"


def test_a_chain_goes_on_after_a_save_and_stops_after_a_crash(stand_in: dict[str, str], tmp_path: Path) -> None:
    def chain(*words: str) -> list[Job]:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}-%j.out"
        command = [REPO / "slurm" / "chain.sh", "3", *TWO_BY_ONE, f"--output={output}", "slurm/pretrain.sh", *words]
        done = run(command, 20, stand_in, REPO)
        assert done.returncode == 0, done.stderr
        return [Job(number, stand_in, Path(str(output).replace("%j", number))) for number in done.stdout.split()]

    saved = chain("gain", "85", "0")
    assert [job.end(60) for job in saved] == ["COMPLETED"] * 3
    assert "the next job of the chain goes on" in saved[0].log()
    assert saved[2].show("Restarts") == "1", "the last one has no successor and requeues itself"
    crashed = chain("3")
    assert [job.end(60) for job in crashed] == ["FAILED", "CANCELLED", "CANCELLED"]


def test_nodes_without_gpus(stand_in: dict[str, str], tmp_path: Path) -> None:
    shape = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2", "--mincpus=4")
    job = submit(stand_in, tmp_path / "out", *shape, "slurm/pretrain.sh", "0")
    assert job.end(60) == "COMPLETED", job.log()
    assert "2 nodes x 2 tasks" in job.log()


def test_a_directory_of_something_else_is_not_written_into(stand_in: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    assert pretrain(stand_in, tmp_path / "out", "2").end(60) == "FAILED"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_scripts_say_how_they_are_used(slurm_cluster: dict[str, str], tmp_path: Path) -> None:
    done = run([REPO / "slurm" / "chain.sh"], 20, slurm_cluster, REPO)
    assert done.returncode == 2
    assert "slurm/chain.sh COUNT [sbatch options]" in done.stderr
    job = submit(slurm_cluster, tmp_path / "out", f"--chdir={tmp_path}", *TWO_BY_ONE, REPO / "slurm" / "pretrain.sh")
    assert job.end(60) == "FAILED"
    assert f"no slurm/env.sh in {tmp_path}: submit from the repository's root" in job.log()


def test_shellcheck() -> None:
    scripts = sorted((REPO / "slurm").glob("*.sh"))
    done = subprocess.run([require("shellcheck"), *scripts], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_env_sets_only_what_is_unset(tmp_path: Path) -> None:
    text = (REPO / "slurm" / "env.sh").read_text()
    site = tmp_path / "env.sh"
    site.write_text(text.replace("\npartition=\n", "\npartition=gpu\n").replace("\ninterface=\n", "\ninterface=ib0\n"))
    show = f". {site}; echo $SBATCH_PARTITION $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME ${{MYTHOS[*]}} [$partition]"
    environ = {"PATH": os.environ["PATH"]}
    assert run(["bash", "-c", show], 20, environ).stdout.split() == ["gpu", "ib0", "ib0", "mythos", "[]"]
    environ |= {"SBATCH_PARTITION": "mine", "NCCL_SOCKET_IFNAME": "eth9"}
    assert run(["bash", "-c", show], 20, environ).stdout.split() == ["mine", "eth9", "ib0", "mythos", "[]"]
    site.write_text(text)
    untouched = run(["bash", "-c", f"env | sort >a; . {site}; env | sort >b; diff a b"], 20, environ, tmp_path)
    assert untouched.stdout == "", "as it is it exports nothing"
