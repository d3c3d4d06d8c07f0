"""Where all ranks meet: one (address, port), the same on every rank, without torch.

MASTER_ADDR and MASTER_PORT win where the user set them. Otherwise every launcher has its own way to agree. The batch
scripts set MASTER_ADDR (slurm/tasks.sh), for there may be no scontrol inside a container.
"""

import contextlib
import os
import socket
import subprocess
import zlib
from collections.abc import Mapping

from mythos.errors import UserError

LOOPBACK = "127.0.0.1"
# Computed ports lie below Linux's ephemeral range (32768 and above), so that no outgoing connection holds one.
FIRST_PORT, PORTS = 20000, 10000
SCONTROL_TIMEOUT_S = 30

_mpi_is_ours = False


def meet(
    environ: Mapping[str, str], launcher: str, rank: int, world_size: int, local_rank: int, local_world_size: int
) -> tuple[str, int]:
    """The address and port for this launcher, with the user's own in place of what would be computed."""
    address, port = environ.get("MASTER_ADDR"), _users_port(environ)
    if address and port:
        # The way out where MPI_Init fails; but with MPI closed, MPICH's mpiexec lets the others run on when one dies.
        return address, port
    if launcher == "torchrun":
        missing = "MASTER_PORT" if address else "MASTER_ADDR"
        raise UserError(
            f"{missing} is not set, though RANK is: start with torchrun, or set MASTER_ADDR and MASTER_PORT"
        )
    if world_size == 1:
        # Also under srun: SLURM_STEP_NODELIST may be that of another job that this one was submitted from.
        found = LOOPBACK, _free_port()
    elif launcher == "srun":
        found = _by_slurm(environ, rank, address)
    else:
        found = _by_mpi(launcher, world_size, local_world_size) or _by_parent(environ, world_size, local_world_size)
    return address or found[0], port or found[1]


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


def _by_slurm(environ: Mapping[str, str], rank: int, users_address: str | None) -> tuple[str, int]:
    """The step's first node, and a port that differs between jobs, the steps of a job and its starts.

    A process that a lost node's Slurm has forgotten may hold the port of the start before.
    """
    job, step = environ.get("SLURM_JOB_ID", ""), environ["SLURM_STEP_ID"]
    if not job.isdecimal():
        raise UserError(f"SLURM_JOB_ID={job!r} is not a job's number: start with srun, or set MASTER_PORT")
    restarts = environ.get("SLURM_RESTART_COUNT", "")
    port = FIRST_PORT + (int(job) + 131 * int(step) + 1009 * int(restarts if restarts.isdecimal() else 0)) % PORTS
    if users_address:
        return users_address, port
    # srun --distribution=arbitrary may put rank 0 elsewhere; the others would wait at the first node for ever.
    if rank == 0 and environ.get("SLURM_NODEID", "0") != "0":
        raise UserError(
            f"SLURM_NODEID={environ['SLURM_NODEID']} for rank 0, which is not on the step's first node: "
            "set MASTER_ADDR to its host, or drop --distribution=arbitrary"
        )
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""
    if not nodes:
        raise UserError("SLURM_STEP_NODELIST is not set: start with srun, or set MASTER_ADDR to the host of rank 0")
    first = _scontrol("show", "hostnames", nodes).split()[0]
    return (first if _resolves(first) else _node_address(first)), port


def _node_address(node: str) -> str:
    """What Slurm itself dials to reach a node whose name nobody resolves (torch would try for ever)."""
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
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=SCONTROL_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"scontrol {' '.join(words)} failed ({error}): set MASTER_ADDR to the host of rank 0") from None
    if done.returncode or not done.stdout.strip():
        why = " ".join(done.stderr.split()) or "no output"
        raise UserError(f"scontrol {' '.join(words)} failed ({why}): set MASTER_ADDR to the host of rank 0")
    return done.stdout


# ---- MPI


def _by_mpi(launcher: str, world_size: int, local_world_size: int) -> tuple[str, int] | None:
    """Rank 0 broadcasts its address and a free port; None where mpi4py has no MPI that fits the launcher.

    MPI stays open until finalise_mpi(). mpiexec ends the others when a rank dies only while that rank's MPI is open;
    and a rank that ends with 0 while its MPI is open takes the others with it.
    """
    global _mpi_is_ours
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False  # at exit it would wait for the others, also in a rank that failed
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # RuntimeError: "cannot load MPI library"
        return None
    # Asked before MPI_Init: MPICH aborts the whole process in MPI_Init under Open MPI's mpirun.
    if (MPI.get_vendor()[0] == "Open MPI") != (launcher == "openmpi"):
        return None
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_FUNNELED)
        _mpi_is_ours = True
    if MPI.COMM_WORLD.Get_size() != world_size:
        finalise_mpi()
        return None
    here = None
    if MPI.COMM_WORLD.Get_rank() == 0:
        here = (LOOPBACK if local_world_size == world_size else _own_address(), _free_port())
    found: tuple[str, int] = MPI.COMM_WORLD.bcast(here, root=0)
    return found


def finalise_mpi() -> None:
    """Close the MPI that meet() opened, if any. Waits for the other ranks to do the same."""
    global _mpi_is_ours
    if _mpi_is_ours:
        from mpi4py import MPI

        MPI.Finalize()
        _mpi_is_ours = False


def _own_address() -> str:
    """This host's address as others see it: what its name means, or (Debian: 127.0.1.1) that of its default route."""
    address = LOOPBACK
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
    if address.startswith("127."):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1", 9))  # an address for examples; connecting a UDP socket sends nothing
            address = probe.getsockname()[0]
    return address


def _by_parent(environ: Mapping[str, str], world_size: int, local_world_size: int) -> tuple[str, int]:
    """Without MPI, on one node: a port from what the ranks share, Open MPI's job name or the parent process."""
    if local_world_size != world_size:
        raise UserError(
            f"{world_size} processes on several nodes, and mpi4py finds no MPI library of their launcher's kind: "
            "set MASTER_ADDR (the host of rank 0) and MASTER_PORT"
        )
    job = environ.get("PMIX_NAMESPACE")
    shared = zlib.crc32(job.encode()) if job else os.getppid()
    return LOOPBACK, FIRST_PORT + shared % PORTS
