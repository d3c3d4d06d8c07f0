"""The rank of this process and the address where all ranks meet, read once from the launcher's environment. No torch.

The innermost launcher is recognised first. torchrun may run under srun, and both kinds of mpiexec start their helpers
with srun inside a Slurm job (their processes then have the helper's SLURM_PROCID), so srun is checked after them.
"""

import os
import re
import signal
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from mythos.errors import DONE, PREEMPTED, UserError
from mythos.ranks import rendezvous

# rank, world size, local rank, local world size
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")

# From here on, Slurm numbers the batch shell, the interactive shell and the like; the steps of srun are below.
FIRST_SPECIAL_STEP = 0xFFFFFFF0

LAUNCHER_NAMES = {"torchrun": "torchrun", "srun": "srun", "mpich": "MPICH mpiexec", "openmpi": "Open MPI mpirun"}


@dataclass(frozen=True)
class World:
    """This process among the others. Use it as a context manager around everything that the process does.

    Leaving the block makes the launcher return the right exit code. MPI is finalised after a normal end and after
    sys.exit with a code that all ranks agree on (DONE, PREEMPTED). After anything else it stays open, so that mpiexec
    ends the other ranks. Under srun --kill-on-bad-exit=1 the first rank that exits with PREEMPTED has the others
    terminated, and srun would return 143; so a rank that is exiting ignores SIGTERM (KILL follows after KillWait).
    """

    launcher: str  # torchrun, srun, mpich, openmpi or bare
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int
    token: str | None = field(default=None, repr=False)
    """The secret of this job's ranks, if they share one already: see ``mythos.ranks.token``."""
    spare_ports: tuple[int, ...] = field(default=(), repr=False)
    """Where the ranks meet if ``port`` is in use, in this order: see ``mythos.network.ports``."""
    job: str = field(default="", repr=False, compare=False)
    """What all ranks of this job know and those of other jobs do not; not a secret."""

    def secret(self, token: str) -> str:
        """With the job's token, what only the ranks of this job know; the same token may serve several jobs."""
        return f"{token} {self.job}"

    @property
    def ports(self) -> tuple[int, ...]:
        """Where the ranks may meet, in the order in which rank 0 tries to open the ports."""
        return (self.port, *self.spare_ports)

    @property
    def place(self) -> str:
        """Rank and host, for error messages."""
        return f"rank {self.rank} on {socket.gethostname()}"

    def describe(self) -> str:
        """One line for the log."""
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        launched = f"by {LAUNCHER_NAMES[self.launcher]}" if self.launcher in LAUNCHER_NAMES else "without a launcher"
        return (
            f"{processes} {launched}: rank {self.rank} of {self.world_size}, local rank {self.local_rank} of "
            f"{self.local_world_size}, rendezvous {self.address}:{self.port}"
        )

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set the variables that torch.distributed reads; afterwards the environment looks like that of torchrun."""
        for name, value in zip(
            TORCHRUN, (self.rank, self.world_size, self.local_rank, self.local_world_size), strict=True
        ):
            environ[name] = str(value)
        environ["MASTER_ADDR"] = self.address
        environ["MASTER_PORT"] = str(self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        agreed = isinstance(error, SystemExit) and error.code in (None, DONE, PREEMPTED)
        if error is None or agreed:
            rendezvous.finalise_mpi()
        # A batch script repeats the signal, and at its end the interpreter restores the default, which kills.
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        if self.launcher == "srun":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """The world that the launcher's variables describe. Raises UserError if they are incomplete or contradictory."""
    launcher = _launcher(environ)
    if launcher == "bare":
        places = (0, 1, 0, 1)
    elif launcher == "srun":
        places = _srun_places(environ)
    else:
        names = {"torchrun": TORCHRUN, "openmpi": OPEN_MPI, "mpich": MPICH}[launcher]
        rank, world_size, local_rank, local_world_size = (_number(environ, name, launcher) for name in names)
        places = (rank, world_size, local_rank, local_world_size)
        _check(names, places, launcher)
    meeting = rendezvous.meet(environ, launcher, *places)
    return World(
        launcher,
        *places,
        meeting.address,
        meeting.port,
        meeting.token,
        meeting.spare_ports,
        f"{os.getuid()} {meeting.job}",
    )


def _launcher(environ: Mapping[str, str]) -> str:
    # WORLD_SIZE alone does not mean torchrun: many batch scripts export it for srun.
    if "RANK" in environ or "LOCAL_RANK" in environ:
        return "torchrun"
    if any(name in environ for name in OPEN_MPI):
        return "openmpi"
    in_step = "SLURM_STEP_ID" in environ
    # srun --mpi=pmi2 sets PMI_RANK and PMI_SIZE too, but no MPI_LOCAL... variable.
    if any(name in environ for name in MPICH[2:]) or (not in_step and any(name in environ for name in MPICH[:2])):
        return "mpich"
    if in_step and _number(environ, "SLURM_STEP_ID", "srun") < FIRST_SPECIAL_STEP and _step_is_ours(environ):
        return "srun"
    return "bare"


def _step_is_ours(environ: Mapping[str, str]) -> bool:
    # A job that was submitted from inside a step inherits that step's variables, except SLURM_NTASKS.
    return environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS")) == environ.get("SLURM_NTASKS")


def _srun_places(environ: Mapping[str, str]) -> tuple[int, int, int, int]:
    rank, world_size, local_rank, node = (_number(environ, name, "srun") for name in (*SRUN[:3], "SLURM_NODEID"))
    counts: list[int] = []
    text = _text(environ, SRUN[3], "srun")  # such as 2(x3),1: three nodes with two tasks, one with one
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"{SRUN[3]}={text!r} is not a list such as 2(x3),1: {_remedy('srun')}")
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise UserError(f"SLURM_NODEID={node}, but {SRUN[3]}={text!r} lists {len(counts)} nodes: {_remedy('srun')}")
    places = (rank, world_size, local_rank, counts[node])
    _check(SRUN, places, "srun")
    return places


def _check(names: tuple[str, str, str, str], places: tuple[int, int, int, int], launcher: str) -> None:
    rank, world_size, local_rank, local_world_size = places
    for here, size, at in ((rank, world_size, 0), (local_rank, local_world_size, 2)):
        if here >= size:
            raise UserError(
                f"{names[at]}={here} must be below the {size} that {names[at + 1]} gives: {_remedy(launcher)}"
            )
    if local_world_size > world_size:
        raise UserError(
            f"{names[3]} gives {local_world_size} processes on this node, but {names[1]}={world_size} in total: "
            f"{_remedy(launcher)}"
        )


def _number(environ: Mapping[str, str], name: str, launcher: str) -> int:
    text = _text(environ, name, launcher)
    if not text.isascii() or not text.isdecimal():
        raise UserError(f"{name}={text!r} is not a whole number of at least 0: {_remedy(launcher)}")
    return int(text)


def _text(environ: Mapping[str, str], name: str, launcher: str) -> str:
    if name not in environ:
        raise UserError(
            f"{name} is not set, though the other variables of {LAUNCHER_NAMES[launcher]} are: {_remedy(launcher)}"
        )
    return environ[name]


def _remedy(launcher: str) -> str:
    own = {"torchrun": "RANK and LOCAL_RANK", "srun": "SLURM_*", "mpich": "PMI_* and MPI_LOCAL*", "openmpi": "OMPI_*"}
    return f"start with {LAUNCHER_NAMES[launcher]}, or unset {own[launcher]} to run one process"
