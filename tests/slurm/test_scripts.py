"""The decisions of the batch scripts, on a real Slurm, with a stand-in for `mythos` that exits with given codes."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mythos.run.status import read_status
from tests.cluster import REPO, SCRIPT, run
from tests.require import require
from tests.slurm.jobs import TWO_BY_ONE, Job, submit, submit_pretrain
from tests.slurm.stand_ins import job_environment


def test_requeues_end_at_the_limit(stand_in: dict[str, str], tmp_path: Path) -> None:
    job = submit_pretrain(stand_in | {"MAX_REQUEUES": "1"}, tmp_path / "out", "gain", "85")
    assert job.end(60) == "FAILED"
    assert (job.show("Restarts"), job.show("ExitCode")) == ("1", "85:0")
    assert "not requeued: MAX_REQUEUES (1) reached" in job.log()


def test_no_requeue_without_progress(stand_in: dict[str, str], tmp_path: Path) -> None:
    job = submit_pretrain(stand_in, tmp_path / "out", "85")
    assert job.end(60) == "FAILED"
    assert (job.show("Restarts"), job.show("ExitCode")) == ("1", "85:0")
    assert "not requeued: no progress since the last time (checkpoint none)" in job.log()


def test_a_node_that_loses_its_ranks_but_responds_is_a_lost_node(
    stand_in: dict[str, str], tmp_path: Path, nodes_come_back: dict[str, str]
) -> None:
    job = submit_pretrain(stand_in | {"SLURM_WAIT": "1"}, tmp_path / "out", "watch", "gain", "1", "0")
    job.wait_until("the ranks", (tmp_path / "run" / "rank_1").exists)
    node = (tmp_path / "run" / "rank_1").read_text(encoding="utf-8").split()[0]
    for command in ("kill-node", "start-node"):
        assert run([SCRIPT, command, node], 20, nodes_come_back).returncode == 0
    assert job.end(90) == "COMPLETED", job.log()
    why = "exit code 1, and a node has lost its ranks without reporting it"
    assert f"{why}; requeued, to resume from checkpoint step_00000000" in job.log()
    assert job.show("Restarts") == "1"


def test_a_node_that_responds_again_while_the_script_waits_for_slurm(tmp_path: Path) -> None:
    """With stand-ins, because the real Slurm marks a node as down at about the same time as the script.

    The controller is busy when it is asked to requeue the job for the first time.
    """
    state, asked = tmp_path / "state", tmp_path / "asked"
    state.write_text("State=MIXED+NOT_RESPONDING\n", encoding="utf-8")
    stand_ins = {
        "mythos": f"echo 2 {tmp_path}/run",
        "srun": 'case "$*" in *" train "*) exit 1 ;; esac',
        "scontrol": f"""case "$1 $2" in
            "show hostnames") printf 'node1\nnode2\n' ;;
            "show node") cat {state}; echo State=MIXED >{state} ;;
            *) [ -e {tmp_path}/busy ] || {{ touch {tmp_path}/busy; exit 1; }}; echo "$@" >{asked} ;;
            esac""",
    }
    environ = job_environment(tmp_path / "bin", stand_ins) | {"MASTER_ADDR": "node1"}
    done = run(["bash", "slurm/pretrain.sh", "MODEL.yaml", "0"], 30, environ, REPO)
    assert done.returncode == 0, done.stderr
    assert "exit code 1, and a node does not respond: waiting for Slurm to requeue the job" in done.stderr
    assert "exit code 1 after the loss of a node; requeued" in done.stderr
    assert asked.read_text(encoding="utf-8") == "requeue 7\n"


@pytest.mark.parametrize("moment", ["job", "train"])
@pytest.mark.parametrize(
    ("starts", "state", "requeued"), [("1", "RUNNING", True), ("1", "COMPLETING", False), ("0", "RUNNING", False)]
)
def test_a_kill_of_the_former_start_does_not_end_the_job(
    moment: str, starts: str, state: str, requeued: bool, tmp_path: Path
) -> None:
    """Slurm delivers it when the lost node is back, where the job may run again; to `scancel` it gives way."""
    kill_script = f'kill -TERM "$(cat {tmp_path}/script)"'
    kill = f"if [ $1 = {moment} ]; then {kill_script}; sleep 0.3; exit 143; fi"
    stand_ins = {
        "mythos": f"{kill}; echo 1 {tmp_path}/run",
        "srun": 'while [ $1 != mythos ]; do shift; done; exec "$@"',
        "scontrol": f"""case "$1 $2" in
            "show hostnames") printf 'node1\nnode2\n' ;;
            "show job") {kill_script}; kill -TERM $$; echo "JobId=7 JobState={state} Reason=None" ;;
            "show node") ;;
            *) echo "$@" >{tmp_path}/asked ;;
            esac""",
    }
    environ = job_environment(tmp_path / "bin", stand_ins) | {"MASTER_ADDR": "node1", "SLURM_RESTART_COUNT": starts}
    script = f"echo $$ >{tmp_path}/script; exec bash slurm/pretrain.sh MODEL.yaml"
    done = run(["bash", "-c", script], 30, environ, REPO)
    assert done.returncode == (0 if requeued else 143), done.stderr
    assert (tmp_path / "asked").exists() == requeued
    assert ("killed with the job's former start on a lost node; requeued" in done.stderr) == requeued
    if requeued:
        assert (tmp_path / "asked").read_text(encoding="utf-8") == "requeue 7\n"


def test_a_step_that_cannot_start_is_not_a_lost_node(stand_in: dict[str, str], tmp_path: Path) -> None:
    job = submit_pretrain(stand_in | {"SLURM_DISTRIBUTION": "nonsense"}, tmp_path / "out", "0")
    assert job.end(20) == "FAILED"
    assert "Invalid --distribution specification" in job.log()
    assert "does not respond" not in job.log()
    assert job.show("Restarts") == "0"


@pytest.mark.parametrize(("words", "code"), [(["1"], "1"), (["unbegun", "7"], "7")])
def test_a_crash_is_not_requeued_and_its_exit_code_is_the_jobs(
    words: list[str], code: str, stand_in: dict[str, str], tmp_path: Path
) -> None:
    job = submit_pretrain(stand_in, tmp_path / "out", *words)
    assert job.end(60) == "FAILED"
    assert (job.show("Restarts"), job.show("ExitCode")) == ("0", f"{code}:0")
    assert "does not respond" not in job.log()
    log = next((tmp_path / "run" / "log").glob("slurm-*.out"))
    assert log.samefile(tmp_path / "out"), "the same file under the run directory"
    if "unbegun" in words:  # no rank can have recorded the cause
        cause = f"job {job.number} ended before the run had begun: see log/{log.name} ("
        assert str(read_status(tmp_path / "run").cause).startswith(cause)


def test_a_chain_continues_after_a_save_and_stops_after_a_crash(stand_in: dict[str, str], tmp_path: Path) -> None:
    def chain(*words: str) -> list[Job]:
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}-%j.out"
        command = [REPO / "slurm" / "chain.sh", "3", *TWO_BY_ONE, f"--output={output}", "slurm/pretrain.sh", *words]
        done = run(command, 20, stand_in, REPO)
        assert done.returncode == 0, done.stderr
        return [Job(number, stand_in, Path(str(output).replace("%j", number))) for number in done.stdout.split()]

    saved = chain("gain", "85", "0")
    assert [job.end(60) for job in saved] == ["COMPLETED"] * 3
    assert "the next job of the chain resumes" in saved[0].log()
    assert saved[2].show("Restarts") == "1", "the last one has no successor and requeues itself"
    crashed = chain("3")
    assert [job.end(60) for job in crashed] == ["FAILED", "CANCELLED", "CANCELLED"]


def test_nodes_without_gpus(stand_in: dict[str, str], tmp_path: Path) -> None:
    shape = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2", "--mincpus=4")
    job = submit(stand_in, tmp_path / "out", *shape, "slurm/pretrain.sh", "0")
    assert job.end(60) == "COMPLETED", job.log()
    assert "2 nodes x 2 tasks" in job.log()


@pytest.mark.parametrize(
    ("shape", "tasks", "gpus"),
    [
        (("--gpus-per-node=2", "--gres=gpu:1"), 1, 1),
        (("--gpus-per-node=2", "--ntasks-per-gpu=1"), 2, 2),
        (("--gpus-per-node=1", "--exclusive"), 1, 1),
    ],
)
def test_one_process_a_gpu_however_gpus_are_requested(
    shape: tuple[str, ...], tasks: int, gpus: int, stand_in: dict[str, str], tmp_path: Path
) -> None:
    job = submit(stand_in, tmp_path / "out", "--nodes=2", "--cpus-per-gpu=3", *shape, "slurm/pretrain.sh", "world", "0")
    assert job.end(60) == "COMPLETED", job.log()
    cpus = 256 if "--exclusive" in shape else 3
    found = re.findall(r"by srun: rank (\d) of \d, local rank \d of (\d), .* GPUs (\S+) CPUs (\d+)", job.log())
    shares = [(int(rank), int(of), len(which.split(",")), int(each)) for rank, of, which, each in sorted(found)]
    assert shares == [(rank, tasks, gpus, cpus) for rank in range(2 * tasks)]


def test_in_a_container_without_slurm_and_with_nothing_exported(stand_in: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "mythos").symlink_to(tmp_path / "bin" / "mythos")
    site = shutil.copytree(REPO / "slurm", tmp_path / "slurm") / "env.sh"
    container = f"MYTHOS=(env PATH={tmp_path}/image PYTHONPATH={REPO} mythos)"
    site.write_text(
        site.read_text(encoding="utf-8").replace("\nMYTHOS=(mythos)\n", f"\n{container}\n"), encoding="utf-8"
    )
    options = (*TWO_BY_ONE, f"--chdir={tmp_path}", "--export=NONE")
    job = submit(stand_in, tmp_path / "out", *options, "slurm/pretrain.sh", "world", "0")
    assert job.end(60) == "COMPLETED", job.log()
    nodes = run(["scontrol", "show", "hostnames", job.show("NodeList")], 20, stand_in).stdout.split()
    port = 20000 + int(job.number) % 10000
    assert re.findall(r"rank (\d) of 2, .*, rendezvous (\S+:\d+) ", job.log())[0][1] in (
        f"{nodes[0]}:{port}",
        f"127.0.1.{nodes[0][-1]}:{port}",  # without namespaces the nodes' names do not resolve
    )

    site.write_text(
        site.read_text(encoding="utf-8").replace("\nsite_modules=()\n", "\nsite_modules=(cuda/99)\n"), encoding="utf-8"
    )
    job = submit(stand_in, tmp_path / "out", *options, "slurm/pretrain.sh", "world", "0")
    assert (job.end(60), job.show("ExitCode")) == ("FAILED", "2:0")
    assert "slurm/env.sh: module load cuda/99 failed: see site_modules there" in job.log()


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "8"}, "8 per node, 8 CPUs"),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "a100:3"}, "3 per node, 21 CPUs"),
        ({"SLURM_GPUS_ON_NODE": "2", "SLURM_GPUS_PER_NODE": "8"}, "2 per node, 32 CPUs"),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_GPUS_PER_NODE": "a100:2,h100:2"}, "4 per node, 16 CPUs"),
        ({"SLURM_GPUS_PER_NODE": "4"}, "4 per node, 16 CPUs"),
        ({"SLURM_GPUS_PER_NODE": "0", "SLURM_NTASKS_PER_NODE": "2"}, "2 per node, 32 CPUs"),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_CPUS_PER_NODE": "64(x2),48,96(x3)"}, "2 per node, 24 CPUs"),
        ({"SLURM_NTASKS_PER_NODE": "99"}, "99 per node, 1 CPUs"),
        ({}, "1 per node, 64 CPUs"),
    ],
)
def test_how_processes_are_spread_over_nodes(environ: dict[str, str], expected: str) -> None:
    slurm = {"PATH": os.environ["PATH"], "MASTER_ADDR": "here"}
    slurm |= {"SLURM_CPUS_ON_NODE": "64", "SLURM_JOB_CPUS_PER_NODE": "64"}
    show = '. slurm/tasks.sh; echo "$per_node per node, $cpus CPUs"'
    assert run(["bash", "-uc", show], 20, slurm | environ, REPO).stdout.strip() == expected


def test_nothing_is_written_into_a_directory_that_is_no_run(stand_in: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious", encoding="utf-8")
    assert submit_pretrain(stand_in, tmp_path / "out", "unbegun", "2").end(60) == "FAILED"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_scripts_print_their_usage(slurm_cluster: dict[str, str], tmp_path: Path) -> None:
    done = run([REPO / "slurm" / "chain.sh"], 20, slurm_cluster, REPO)
    assert done.returncode == 2
    assert "slurm/chain.sh COUNT [sbatch options]" in done.stderr
    job = submit(slurm_cluster, tmp_path / "out", f"--chdir={tmp_path}", *TWO_BY_ONE, REPO / "slurm" / "pretrain.sh")
    assert job.end(60) == "FAILED"
    assert f"no slurm/env.sh in {tmp_path}: submit from the repository's root" in job.log()


def test_shellcheck() -> None:
    scripts = sorted((REPO / "slurm").glob("*.sh"))
    done = subprocess.run([require("shellcheck"), *scripts], capture_output=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stdout


def test_env_sets_only_what_is_unset(tmp_path: Path) -> None:
    text = (REPO / "slurm" / "env.sh").read_text(encoding="utf-8")
    site = tmp_path / "env.sh"
    changed = {"site_partition=": "site_partition=gpu", "site_interface=": "site_interface=ib0"}
    site.write_text("\n".join(changed.get(line, line) for line in text.splitlines()), encoding="utf-8")
    show = f". {site}; echo $SBATCH_PARTITION $NCCL_SOCKET_IFNAME $GLOO_SOCKET_IFNAME ${{MYTHOS[*]}} [$site_partition]"
    environ = {"PATH": os.environ["PATH"]}
    assert run(["bash", "-c", show], 20, environ).stdout.split() == ["gpu", "ib0", "ib0", "mythos", "[]"]
    environ |= {"SBATCH_PARTITION": "mine", "NCCL_SOCKET_IFNAME": "eth9"}
    assert run(["bash", "-c", show], 20, environ).stdout.split() == ["mine", "eth9", "ib0", "mythos", "[]"]
    site.write_text(text, encoding="utf-8")
    untouched = run(["bash", "-c", f"env | sort >a; . {site}; env | sort >b; diff a b"], 20, environ, tmp_path)
    assert untouched.stdout == "", "without changes it exports nothing"
    own = f"partition=p account=a modules=m; . {site}; echo $partition $account $modules"
    assert run(["bash", "-c", own], 20, environ).stdout == "p a m\n", "the user's own variables are unchanged"
