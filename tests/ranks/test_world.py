"""mythos.ranks.world reads every launcher's variables, and names an invalid one in one line."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable

import pytest

from mythos.errors import UserError
from mythos.ranks import rendezvous
from mythos.ranks.world import World, read_world
from tests.cluster import clean_environment

MEET = {"MASTER_ADDR": "host", "MASTER_PORT": "1234"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
# Seen in a task of `srun -N2 -n4` under Slurm 22.05.
SRUN = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}
SRUN_2X2 = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_LOCALID": "1"}
# Seen in the batch shell of the same job: no step.
BATCH = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "3,1",
}
# Seen in salloc's shell with LaunchParameters=use_interactive_step.
INTERACTIVE = {**BATCH, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
# Seen in the batch shell of a job submitted by a task of `srun -n1`: the step is the other job's.
INHERITED = {**BATCH, "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
# mpiexec starts its helpers with srun inside a job: the helper's variables are set beside the rank's own.
HELPER = {**SRUN, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


@pytest.mark.parametrize(
    ("environ", "launcher"),
    [
        (TORCHRUN, "torchrun"),
        (SRUN_2X2, "srun"),
        (MPICH, "mpich"),
        (OPEN_MPI, "openmpi"),
        ({**SRUN_2X2, **TORCHRUN}, "torchrun"),
        ({**MPICH, **TORCHRUN}, "torchrun"),
        ({**HELPER, **MPICH}, "mpich"),
        ({**HELPER, **OPEN_MPI}, "openmpi"),
        ({**SRUN_2X2, "PMI_RANK": "3", "PMI_SIZE": "4"}, "srun"),  # srun --mpi=pmi2
        ({**SRUN_2X2, "WORLD_SIZE": "4"}, "srun"),  # exported by many batch scripts
    ],
)
def test_each_launcher_is_recognised_and_the_innermost_first(environ: dict[str, str], launcher: str) -> None:
    assert read_world({**environ, **MEET}) == World(launcher, 3, 4, 1, 2, "host", 1234)


@pytest.mark.parametrize("environ", [{}, BATCH, INTERACTIVE, INHERITED, {"WORLD_SIZE": "4"}])
def test_a_process_that_no_launcher_started_is_alone(environ: dict[str, str]) -> None:
    world = read_world(environ)
    assert (world.launcher, world.rank, world.world_size, world.local_rank, world.local_world_size) == (
        "bare", 0, 1, 0, 1,
    )  # fmt: skip
    assert world.address == "127.0.0.1"
    assert 0 < world.port < 65536


@pytest.mark.parametrize(
    ("tasks", "node", "count"), [("3,1", "0", 3), ("3,1", "1", 1), ("2(x3),5", "2", 2), ("2(x3),5", "3", 5)]
)
def test_uneven_tasks_per_node(tasks: str, node: str, count: int) -> None:
    environ = {**SRUN, **MEET, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": node}
    environ |= {"SLURM_NTASKS": "11", "SLURM_STEP_NUM_TASKS": "11"}
    assert read_world(environ).local_world_size == count


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN_2X2, MPICH, OPEN_MPI])
def test_every_variable_is_required_and_must_be_a_number(environ: dict[str, str]) -> None:
    optional = {"SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"}
    for name in environ.keys() - optional:
        without = {key: value for key, value in environ.items() if key != name}
        if name == "SLURM_NTASKS":
            del without["SLURM_STEP_NUM_TASKS"]
        _fails({**without, **MEET}, rf"^{name} is not set, .*: start with ")
        for bad in ("two", "-1", "", "1.5"):
            changed = {**environ, **MEET, name: bad}
            if name == "SLURM_NTASKS":
                changed["SLURM_STEP_NUM_TASKS"] = bad
            _fails(changed, rf"^{name}='{bad}' is not .*: start with ")


@pytest.mark.parametrize(
    ("environ", "change", "message"),
    [
        (TORCHRUN, {"RANK": "4"}, "RANK=4 must be below the 4 that WORLD_SIZE gives"),
        (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 must be below the 2 that LOCAL_WORLD_SIZE gives"),
        (
            TORCHRUN,
            {"LOCAL_WORLD_SIZE": "5"},
            "LOCAL_WORLD_SIZE gives 5 processes on this node, but WORLD_SIZE=4 in total",
        ),
        (SRUN_2X2, {"SLURM_PROCID": "9"}, "SLURM_PROCID=9 must be below the 4 that SLURM_NTASKS gives"),
        (SRUN_2X2, {"SLURM_NODEID": "2"}, "SLURM_NODEID=2, but SLURM_STEP_TASKS_PER_NODE='2.x2.' lists 2 nodes"),
        (SRUN_2X2, {"SLURM_STEP_ID": "x"}, "SLURM_STEP_ID='x' is not a whole number"),
        (MPICH, {"PMI_SIZE": "0"}, "PMI_RANK=3 must be below the 0 that PMI_SIZE gives"),
        (OPEN_MPI, {"OMPI_COMM_WORLD_LOCAL_RANK": "7"}, "OMPI_COMM_WORLD_LOCAL_RANK=7 must be below the 2 that OMPI_"),
        (TORCHRUN, {"MASTER_PORT": "99999"}, "MASTER_PORT='99999' is not a port"),
        ({}, {"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a port"),
    ],
)
def test_values_that_contradict_each_other(environ: dict[str, str], change: dict[str, str], message: str) -> None:
    _fails({**environ, **MEET, **change}, f"^{message}")


def test_torchrun_needs_its_rendezvous() -> None:
    _fails(TORCHRUN, "^MASTER_ADDR is not set")
    _fails({**TORCHRUN, "MASTER_ADDR": "host"}, "^MASTER_PORT is not set")


# ---- the rendezvous under srun


@pytest.fixture
def scontrol(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """An scontrol that knows two nodes, whose names do not resolve; only the NodeAddr of node1 does."""
    calls: list[tuple[str, ...]] = []

    def answer(*words: str) -> str:
        calls.append(words)
        if words[1] == "hostnames":
            return "node1\nnode2\n" if words[2] == "node[1-2]" else f"{words[2]}\n"
        return f"NodeName={words[2]} Arch=x86_64 NodeAddr=10.0.0.{words[2][-1]} NodeHostName=localhost\n"

    monkeypatch.setattr(rendezvous, "_scontrol", answer)
    monkeypatch.setattr(rendezvous, "_resolves", lambda name: name == "10.0.0.1")
    return calls


def test_srun_uses_the_name_if_it_resolves(scontrol: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_resolves", lambda name: True)
    world = read_world(SRUN)
    assert (world.address, world.port) == ("node1", 20000 + 17 + 2 * 131)
    assert read_world({**SRUN, "SLURM_STEP_NODELIST": "node7"}).address == "node7"
    assert read_world({**SRUN, "SLURM_STEP_ID": "3"}).port != world.port
    assert read_world({**SRUN, "SLURM_JOB_ID": "99999999"}).port < 30000
    ports = {read_world({**SRUN, "SLURM_RESTART_COUNT": count}).port for count in ("", "0", "1", "2")}
    assert len(ports) == 3, "a process of the previous start may still use its port"


def test_srun_uses_the_node_address_if_the_name_does_not_resolve(scontrol: list[tuple[str, ...]]) -> None:
    assert read_world(SRUN).address == "10.0.0.1"
    _fails({**SRUN, "SLURM_STEP_NODELIST": "node2"}, "^the name node2 of the first node does not resolve")


def test_notices_before_the_names_of_the_nodes_are_passed_over(
    scontrol: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = rendezvous._scontrol
    monkeypatch.setattr(rendezvous, "_scontrol", lambda *words: f"Welcome to node9\n\n{names(*words)}")
    assert read_world({**SRUN, "SLURM_STEP_NUM_NODES": "2"}).address == "10.0.0.1"
    _fails(SRUN, r"^scontrol show hostnames node\[1-2\]: 'Welcome to node9' is not the name of a node: set MASTER_ADDR")


def test_srun_with_rank_0_on_another_node(scontrol: list[tuple[str, ...]]) -> None:
    _fails({**SRUN, "SLURM_PROCID": "0"}, "^SLURM_NODEID=1 for rank 0, which is not on the step's first node")


def test_srun_of_one_task_does_not_call_scontrol(scontrol: list[tuple[str, ...]]) -> None:
    one = {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    world = read_world({**SRUN, **one, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert (world.launcher, world.world_size, world.address) == ("srun", 1, "127.0.0.1")
    assert scontrol == []


def test_the_users_address_and_port_take_precedence_separately(scontrol: list[tuple[str, ...]]) -> None:
    world = read_world({**SRUN, "MASTER_PORT": "4000"})
    assert (world.address, world.port) == ("10.0.0.1", 4000)
    scontrol.clear()
    world = read_world({**SRUN, "MASTER_ADDR": "login"})
    assert (world.address, world.port) == ("login", 20000 + 17 + 2 * 131)
    assert scontrol == []
    assert read_world({"MASTER_ADDR": "login"}).address == "login"
    assert read_world({"MASTER_PORT": "4000"}).port == 4000


def test_a_failing_scontrol_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _fails(SRUN, r"^scontrol show hostnames node\[1-2\] failed .*: set MASTER_ADDR")


# ---- the rendezvous under MPI


@pytest.fixture
def no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_by_mpi", lambda *_: None)


@pytest.mark.parametrize("environ", [MPICH, OPEN_MPI])
def test_several_nodes_without_mpi(environ: dict[str, str], no_mpi: None) -> None:
    _fails(environ, "^4 processes on several nodes, .*: set MASTER_ADDR .* and MASTER_PORT$")
    assert read_world({**environ, **MEET}).address == "host"


@pytest.mark.parametrize("environ", [MPICH, OPEN_MPI])
def test_one_node_without_mpi_meets_at_a_port_of_its_launcher(environ: dict[str, str], no_mpi: None) -> None:
    one_node = {name: "4" if value == "2" else value for name, value in environ.items()}
    ports = {read_world({**one_node, "PMIX_NAMESPACE": job}).port for job in ("a", "a", "b")}
    assert len(ports) == 2
    world = read_world(one_node)
    assert world.address == "127.0.0.1"
    assert 20000 <= world.port < 30000


# ---- the secret


def test_the_users_secret_takes_precedence() -> None:
    assert read_world({**MPICH, **MEET}).token is None
    assert read_world({**MPICH, **MEET, "MYTHOS_JOB_TOKEN": "own"}).token == "own"
    assert read_world({**TORCHRUN, **MEET, "MYTHOS_JOB_TOKEN": ""}).token is None


# ---- World


def test_what_mythos_data_needs_imports_no_torch() -> None:
    names = ("world", "rendezvous", "token", "variables", "exits", "preemption")
    program = "".join(f"import mythos.ranks.{name}\n" for name in names)
    program += "import mythos.network.messages, data_prep.workers\nimport sys\nassert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, encoding="utf-8", env=clean_environment(), check=False
    )
    assert done.returncode == 0, done.stderr


def _world() -> World:
    return World("srun", 0, 4, 0, 2, "node1", 24512)


def test_describe() -> None:
    text = "4 processes by srun: rank 0 of 4, local rank 0 of 2, rendezvous node1:24512"
    assert _world().describe() == text
    alone = World("bare", 0, 1, 0, 1, "127.0.0.1", 5)
    assert alone.describe() == ("1 process without a launcher: rank 0 of 1, local rank 0 of 1, rendezvous 127.0.0.1:5")


def test_export_sets_what_torchrun_would_set() -> None:
    environ = {"OTHER": "kept"}
    _world().export(environ)
    assert environ.pop("OTHER") == "kept"
    assert dataclasses.replace(read_world(environ), launcher="srun") == _world()
    assert len(environ) == 6


def _leave_with(error: BaseException | None) -> Callable[[], None]:
    def leave() -> None:
        with dataclasses.replace(_world(), launcher="mpich"):
            if error is not None:
                raise error

    return leave


def test_only_an_agreed_end_finalises_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[int] = []
    monkeypatch.setattr(rendezvous, "finalise_mpi", lambda: ends.append(1))
    _leave_with(None)()
    for agreed in (SystemExit(0), SystemExit(None), SystemExit(85)):
        with pytest.raises(SystemExit):
            _leave_with(agreed)()
    assert len(ends) == 4
    for failure in (SystemExit(3), SystemExit("text"), ValueError(), KeyboardInterrupt()):
        with pytest.raises(type(failure)):
            _leave_with(failure)()
    assert len(ends) == 4


def _fails(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_world(environ)
    assert "\n" not in str(caught.value)
