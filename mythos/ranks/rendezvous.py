"""The address and port at which all ranks meet, the same on every rank. No torch.

MASTER_ADDR and MASTER_PORT are used if they are set. Otherwise the ranks find a common value in a way that depends on
the launcher. The batch scripts set MASTER_ADDR (slurm/tasks.sh), because a container may have no scontrol.
"""

import contextlib
import os
import re
import secrets
import socket
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mythos.errors import UserError

LOOPBACK = "127.0.0.1"
# Below Linux's ephemeral range (32768 and above), so that no outgoing connection uses one of these ports.
FIRST_PORT, PORTS = 20000, 10000
SPARE_PORTS = 19
"""How many ports after the first one are tried if that is in use."""
JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
SCONTROL_TIMEOUT_S = 30
HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_opened_mpi = False


@dataclass(frozen=True)
class Meeting:
    """Where the ranks meet."""

    address: str
    port: int
    token: str | None = None
    users_port: bool = False
    job: str = ""
    """What all ranks of this job know and those of other jobs do not, as far as the launcher says; not a secret."""
    """A secret of this job's ranks; None if they do not share one yet (see ``mythos.ranks.token``)."""

    @property
    def spare_ports(self) -> tuple[int, ...]:
        """The next ports, unless the user has chosen the port, which a firewall may require."""
        return () if self.users_port else tuple(range(self.port + 1, min(self.port + 1 + SPARE_PORTS, 1 << 16)))


def meet(
    environ: Mapping[str, str], launcher: str, rank: int, world_size: int, local_rank: int, local_world_size: int
) -> Meeting:
    """Where the ranks of this launcher meet; variables that the user has set take precedence."""
    address, port, token = environ.get("MASTER_ADDR"), _users_port(environ), environ.get("MYTHOS_JOB_TOKEN") or None
    job = " ".join(environ.get(name, "") for name in JOB_VARIABLES) if launcher == "srun" else ""
    if address and port:
        # MPI is not initialised, which helps if MPI_Init fails; MPICH's mpiexec then does not end the others of a dead
        # rank.
        return Meeting(address, port, token, users_port=True, job=job)
    if launcher == "torchrun":
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise UserError(
            f"{missing} is not set, though RANK is: start with torchrun, or set MASTER_ADDR and MASTER_PORT"
        )
    if world_size == 1:
        # Also under srun: SLURM_STEP_NODELIST may come from another job, from which this one was submitted.
        found = Meeting(LOOPBACK, _free_port())
    elif launcher == "srun":
        found = _by_slurm(environ, rank, address)
    else:
        found = _by_mpi(launcher, world_size, local_world_size) or _by_parent(environ, world_size, local_world_size)
    return replace(
        found,
        address=address or found.address,
        port=port or found.port,
        token=token or found.token,
        users_port=port is not None,
        job=job or found.job,
    )


def _users_port(environ: Mapping[str, str]) -> int | None:
    text = environ.get("MASTER_PORT")
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) < 65536:
        raise UserError(f"MASTER_PORT={text!r} is not a port: set a number from 1 to 65535, or unset it")
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


# ---- Slurm


def _by_slurm(environ: Mapping[str, str], rank: int, users_address: str | None) -> Meeting:
    """The step's first node, and a port that differs between jobs, the steps of a job and the starts of a job.

    After the loss of a node, a process of the previous start may still use that start's port.
    """
    job, step = environ.get("SLURM_JOB_ID", ""), environ["SLURM_STEP_ID"]
    if not job.isdecimal():
        raise UserError(f"SLURM_JOB_ID={job!r} is not the number of a job: start with srun, or set MASTER_PORT")
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    port = FIRST_PORT + (int(job) + 131 * int(step) + 1009 * int(restarts if restarts.isdecimal() else 0)) % PORTS
    if users_address:
        return Meeting(users_address, port)
    # srun --distribution=arbitrary may start rank 0 on another node; the other ranks would wait for ever.
    if rank == 0 and environ.get("SLURM_NODEID", "0") != "0":
        raise UserError(
            f"SLURM_NODEID={environ['SLURM_NODEID']} for rank 0, which is not on the step's first node: "
            "set MASTER_ADDR to its host, or drop --distribution=arbitrary"
        )
    first = _first_node(environ)
    return Meeting(first if _resolves(first) else _node_address(first), port)


def _first_node(environ: Mapping[str, str]) -> str:
    kind = "STEP" if environ.get("SLURM_STEP_NODELIST") else "JOB"
    nodes, count = environ.get(f"SLURM_{kind}_NODELIST"), environ.get(f"SLURM_{kind}_NUM_NODES", "")
    if not nodes:
        raise UserError("SLURM_STEP_NODELIST is not set: start with srun, or set MASTER_ADDR to the host of rank 0")
    lines = _scontrol("show", "hostnames", nodes).splitlines()
    if count.isdecimal():
        lines = lines[-int(count) :]  # a site's wrapper may print notices first
    for line in lines:
        if not HOST_NAME.fullmatch(line):
            raise UserError(
                f"scontrol show hostnames {nodes}: {line[:200]!r} is not the name of a node: set MASTER_ADDR to the "
                "host of rank 0"
            )
    return lines[0]


def _node_address(node: str) -> str:
    """The address by which Slurm reaches a node whose name does not resolve (torch would retry for ever)."""
    for field in _scontrol("show", "node", node, "-o").split():
        if field.startswith("NodeAddr=") and _resolves(field.removeprefix("NodeAddr=")):
            return field.removeprefix("NodeAddr=")
    raise UserError(f"the name {node} of the first node does not resolve, nor its NodeAddr in Slurm: set MASTER_ADDR")


def _resolves(name: str) -> bool:
    try:
        return bool(socket.getaddrinfo(name, None))
    except OSError:
        return False


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(
            ["scontrol", *words], capture_output=True, encoding="utf-8", errors="replace", timeout=SCONTROL_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"scontrol {' '.join(words)} failed ({error}): set MASTER_ADDR to the host of rank 0") from None
    if done.returncode or not done.stdout.strip():
        why = " ".join(done.stderr.split()) or "no output"
        raise UserError(f"scontrol {' '.join(words)} failed ({why}): set MASTER_ADDR to the host of rank 0")
    return done.stdout


# ---- MPI


def _by_mpi(launcher: str, world_size: int, local_world_size: int) -> Meeting | None:
    """Rank 0 broadcasts its address, a free port and a secret; None if mpi4py has no MPI that fits the launcher.

    MPI stays open until finalise_mpi(): mpiexec ends the other ranks when one dies, but only while the MPI of that rank
    is open. A rank that ends with exit code 0 while its MPI is open also ends the others.
    """
    global _opened_mpi
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False  # at exit it would wait for the other ranks, also in a rank that failed
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # RuntimeError: "cannot load MPI library"
        return None
    # Checked before MPI_Init, in which MPICH aborts the process under Open MPI's mpirun.
    if (MPI.get_vendor()[0] == "Open MPI") != (launcher == "openmpi"):
        return None
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_FUNNELED)
        _opened_mpi = True
    if MPI.COMM_WORLD.Get_size() != world_size:
        finalise_mpi()
        return None
    here = None
    if MPI.COMM_WORLD.Get_rank() == 0:
        address = LOOPBACK if local_world_size == world_size else _own_address()
        here = Meeting(address, _free_port(), secrets.token_hex(16))
    meeting: Meeting = MPI.COMM_WORLD.bcast(here, root=0)
    return meeting


def finalise_mpi() -> None:
    """Finalise MPI if meet() has initialised it. Waits for the other ranks to do the same."""
    global _opened_mpi
    if _opened_mpi:
        from mpi4py import MPI

        MPI.Finalize()
        _opened_mpi = False


def _own_address() -> str:
    """The address of this host's name, or that of its default route if the name is local (on Debian: 127.0.1.1)."""
    address = LOOPBACK
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # an address reserved for examples; connecting a UDP socket sends nothing
            address = probe.getsockname()[0]
    return address


def _by_parent(environ: Mapping[str, str], world_size: int, local_world_size: int) -> Meeting:
    """Without MPI, on one node: the port follows from what all ranks share, Open MPI's job name or the parent."""
    if local_world_size != world_size:
        raise UserError(
            f"{world_size} processes on several nodes, and mpi4py finds no MPI library that fits their launcher: "
            "set MASTER_ADDR (the host of rank 0) and MASTER_PORT"
        )
    job = environ.get("PMIX_NAMESPACE")
    shared = zlib.crc32(job.encode()) if job else os.getppid()
    return Meeting(LOOPBACK, FIRST_PORT + shared % PORTS, job=str(shared))
