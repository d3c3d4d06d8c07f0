"""What the batch scripts read: numbers, and output of commands, which notices of a container or a site may precede."""

from pathlib import Path

import pytest

from tests.cluster import REPO, run
from tests.slurm.stand_ins import job_environment

NOTICE = "echo '3 packages can be updated'; echo 'Welcome to node9'"
NAMES = "printf 'node1\\nnode2\\n'"


def scontrol(hostnames: str) -> str:
    return f'case "$2" in hostnames) {hostnames} ;; *) echo State=IDLE NodeAddr=127.0.0.1 ;; esac'


def test_notices_before_the_answers_are_passed_over(tmp_path: Path) -> None:
    programs = {
        "mythos": f"{NOTICE}; echo 2 '{tmp_path}/my run'",
        "srun": f'echo "$MASTER_ADDR $*" >{tmp_path}/started',
        "scontrol": scontrol(f"{NOTICE}; {NAMES}"),
        "getent": "exit 0",
    }
    done = run(["bash", "slurm/pretrain.sh", "MODEL.yaml"], 30, job_environment(tmp_path / "bin", programs), REPO)
    assert done.returncode == 0, done.stderr
    assert f"2 nodes x 1 tasks, run directory {tmp_path}/my run\n" in done.stderr
    started = (tmp_path / "started").read_text(encoding="utf-8")
    assert started.startswith("node1 --kill-on-bad-exit=1 ")
    assert "--nodes=2" in started
    assert "--nodelist=node1,node2 mythos train MODEL.yaml" in started
    assert (tmp_path / "my run" / "log").is_dir()


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (f"echo 2 runs/a; {NOTICE}", "Welcome\\ to\\ node9"),
        ("echo 3 updates", "3\\ updates"),
        ("echo 99999999999999999999 updates", "99999999999999999999\\ updates"),
        ("printf '2 runs/\\033[2J'", "$'2 runs/\\E[2J'"),
        ("echo 2", "2"),
        ("true", "''"),
    ],
)
def test_another_answer_of_mythos_job_ends_the_job_with_one_line(answer: str, shown: str, tmp_path: Path) -> None:
    programs = {"mythos": answer, "srun": f"touch {tmp_path}/started", "scontrol": scontrol(NAMES), "getent": "exit 0"}
    done = run(["bash", "slurm/pretrain.sh", "MODEL.yaml"], 30, job_environment(tmp_path / "bin", programs), REPO)
    assert (done.returncode, done.stderr) == (
        2,
        "pretrain.sh: mythos job: the last line of its output is not the number of nodes and the run directory, but "
        f"{shown}: see MYTHOS in slurm/env.sh\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["bin"], "no directory is made, nothing is started"


@pytest.mark.parametrize("script", ["pretrain.sh", "data_prep.sh"])
@pytest.mark.parametrize("hostnames", [f"{NAMES}; {NOTICE}", "exit 1", "printf 'node1\\nnode2; reboot\\n'"])
def test_another_answer_of_scontrol_ends_the_job_with_one_line(script: str, hostnames: str, tmp_path: Path) -> None:
    programs = {"srun": f"touch {tmp_path}/started", "scontrol": scontrol(hostnames)}
    done = run(["bash", f"slurm/{script}", "verify"], 30, job_environment(tmp_path / "bin", programs), REPO)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "scontrol show hostnames node[1-2]: the last 2 lines of its output are not the names of 2" in done.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("name", ["MAX_REQUEUES", "NODE_LOSS_WAIT_S", "SLURM_WAIT"])
@pytest.mark.parametrize("value", ["abc", "-1", "08", "1e3", "99999999999999999999", "x[$(touch evaluated)]"])
def test_a_number_that_is_none_ends_the_job_with_one_line(name: str, value: str, tmp_path: Path) -> None:
    programs = {"mythos": "echo 2 run", "srun": f"touch {tmp_path}/started", "scontrol": scontrol(NAMES)}
    environ = job_environment(tmp_path / "bin", programs) | {name: value}
    done = run(["bash", "slurm/pretrain.sh", "MODEL.yaml"], 30, environ, REPO)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"slurm/tasks.sh: {name}=")
    assert done.stderr.endswith(": give a whole number up to 999999\n")


def test_a_chain_has_at_most_999_jobs(tmp_path: Path) -> None:
    environ = job_environment(tmp_path / "bin", {"sbatch": f"touch {tmp_path}/submitted; echo 1"})
    done = run(["bash", "slurm/chain.sh", "1000", "slurm/pretrain.sh"], 30, environ, REPO)
    assert done.returncode == 2
    assert not (tmp_path / "submitted").exists()


def test_a_chain_passes_notices_over_and_ends_at_another_answer(tmp_path: Path) -> None:
    sbatch = f'{NOTICE}; echo "$@" >>{tmp_path}/submitted; wc -l <{tmp_path}/submitted'
    environ = job_environment(tmp_path / "bin", {"sbatch": sbatch})
    done = run(["bash", "slurm/chain.sh", "2", "slurm/pretrain.sh"], 30, environ, REPO)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["1", "2"], "")
    assert "--dependency=aftercorr:1 " in (tmp_path / "submitted").read_text(encoding="utf-8")
    environ = job_environment(tmp_path / "bin", {"sbatch": f"echo 8; {NOTICE}"})
    done = run(["bash", "slurm/chain.sh", "2", "slurm/pretrain.sh"], 30, environ, REPO)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("chain.sh: sbatch --parsable: the last line of its output is not the number of a job")


def test_the_name_in_latest_is_not_evaluated(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    for name in ("step_00000008", "step_x[$(touch evaluated)]9"):
        (run_directory / "checkpoints" / name).mkdir(parents=True)
        (run_directory / "checkpoints" / name / "state.json").touch()
    latest = run_directory / "checkpoints" / "latest"
    environ = job_environment(tmp_path / "bin", {"srun": 'echo "$@"'}) | {"MASTER_ADDR": "node1"}

    def evaluate(*words: str) -> tuple[int, str, str]:
        script = ["bash", "slurm/eval.sh", run_directory, *words]
        done = run(script, 30, environ, REPO)
        return done.returncode, done.stdout, done.stderr

    latest.write_text(f"step_x[$(touch {tmp_path}/evaluated)]", encoding="utf-8")
    assert evaluate() == (2, "", f"eval.sh: {latest}: not the name of a checkpoint: give --step N or all\n")
    latest.write_text("step_00000008\n", encoding="utf-8")
    for words in ((), ("all",)):
        assert evaluate(*words)[1].endswith(f"mythos eval {run_directory} --step 8\n")
    latest.unlink()
    words = ["--watch", "--depths", "1,2", "--no-bos", "eval.sequences=4"]
    followed = f"mythos eval {run_directory} --watch --depths 1,2 --no-bos eval.sequences=4\n"
    assert evaluate(*words)[1].endswith(followed), "before the first checkpoint"
    assert evaluate("--watch", "--step", "8")[::2] == (
        2,
        "eval.sh: --watch evaluates every checkpoint in one job: leave out --step, all and --array\n",
    )
    assert evaluate("--depths")[::2] == (2, "eval.sh: --depths: give a value\n")
    assert evaluate() == (2, "", f"eval.sh: {run_directory}: no complete checkpoint yet\n")
    assert not (tmp_path / "evaluated").exists()


def price(options: list[str], directory: Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, output and complaints of a dry run, with a planner that prints the shape that it is asked for."""
    programs = {"mythos": '[ "$2" = jobs ] || echo "$5 x ${6#*=}"', "squeue": "exit 0", "sbatch": "exit 9"}
    environ = job_environment(directory / "bin", programs) | variables
    done = run(["bash", "slurm/parity.sh", "EXPERIMENT.yaml", "--dry-run", *options], 30, environ, REPO)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ("", "2 x 8"),
        ("--time 1:00:00 --nodes 4 --exclusive", "4 x 8"),
        ("--nodes=4 -N3", "3 x 8"),
        ("-N 4 --gpus-per-node=a100:4", "4 x 4"),
        ("--gpus-per-node 4 -G 8", "2 x 4"),
        ("--gpus-per-node=a100:2,h100:1", "2 x 3"),
        ("--gres=lscratch:50,gpu:4", "2 x 4"),
        ("--gres gpu:a100:4,lscratch:50", "2 x 4"),
        ("--gres=gpu", "2 x 1"),
        ("--gres=lscratch:50", "2 x 8"),
        ("--gres=gpu:8 --gpus-per-node=2", "2 x 2"),
        ("--gpus-per-node=0 --ntasks-per-node 6", "2 x 6"),
        ("--gpus-per-node=0", "2 x 1"),
    ],
)
def test_the_shape_of_the_price_is_that_of_the_jobs(options: str, shape: str, tmp_path: Path) -> None:
    said = f"price of each run, nodes x processes: {shape}:\n{shape}\n"
    assert price(options.split(), tmp_path)[:2] == (0, said)


def test_the_shape_of_the_price_is_also_that_of_ranges_and_of_variables_of_sbatch(tmp_path: Path) -> None:
    said = "price of each run, nodes x processes: 2 x 4, the fewest of --nodes=2-6:\n2 x 4\n"
    assert price(["-N2-6"], tmp_path, SBATCH_GRES="gpu:4")[:2] == (0, said)
    assert price(["--nodes=4"], tmp_path, SBATCH_GPUS_PER_NODE="2")[1].endswith("\n4 x 2\n")


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("-G32", "--gpus=32 is not 2 nodes x 8 GPUs: give --nodes=N and --gpus-per-node=N instead"),
        ("--nodes=x[$(touch evaluated)]", "--nodes=x\\[\\$\\(touch\\ evaluated\\)\\]: give the number of nodes"),
    ],
)
def test_a_shape_that_is_none_has_no_price(option: str, complaint: str, tmp_path: Path) -> None:
    code, said, complaints = price([option], tmp_path)
    assert (code, said, complaints.splitlines()[-1]) == (2, "", f"parity.sh: no price: {complaint}")


def test_an_array_over_runs_evaluates_one_checkpoint_of_each(tmp_path: Path) -> None:
    environ = job_environment(tmp_path / "bin", {"srun": 'echo "$@"'}) | {"MASTER_ADDR": "node1"}
    task = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "1"}
    for name in ("seed-2", "50%adamw"):
        for step in (8, 16):
            (tmp_path / name / f"checkpoints/step_{step:08}").mkdir(parents=True)
            (tmp_path / name / f"checkpoints/step_{step:08}/state.json").touch()
        (tmp_path / name / "checkpoints/latest").write_text("step_00000016\n", encoding="utf-8")

    def evaluate(name: str, *words: str, **variables: str) -> tuple[int, str, str]:
        done = run(["bash", "slurm/eval.sh", tmp_path / name, *words], 30, environ | variables, REPO)
        return done.returncode, done.stdout.partition("mythos eval ")[2], done.stderr

    assert evaluate("seed-%a", **task) == (0, f"{tmp_path}/seed-2 --step 16\n", "")
    assert evaluate("seed-%a", "--step", "8", **task) == (0, f"{tmp_path}/seed-2 --step 8\n", "")
    for words in (("all",), ("--step", "8", "--step", "16")):
        code, started, complaint = evaluate("seed-%a", *words, **task)
        assert (code, started, complaint.count("\n")) == (2, "", 1)
        assert complaint.startswith("eval.sh: with %a each task evaluates one checkpoint of a run of its own: ")
    assert evaluate("50%adamw") == (0, f"{tmp_path}/50%adamw --step 16\n", "")
    assert evaluate("50%adamw", "all", **task) == (0, f"{tmp_path}/50%adamw --step 16\n", ""), "its second checkpoint"
    assert evaluate("seed-%a") == (2, "", f"eval.sh: {tmp_path}/seed-%a: no run with checkpoints there\n")
