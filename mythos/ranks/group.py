"""The process group, the device, and agreement between ranks. Everything here is collective: call it on all ranks."""

import itertools
import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mythos.errors import UserError
from mythos.ranks.variables import set_variables
from mythos.run.console import log

T = TypeVar("T")
TIMEOUT = timedelta(minutes=10)
MEET_TIMEOUT = timedelta(minutes=10)
NOTICE_S = 30.0
_meeting: dist.Store | None = None
_decisions = itertools.count()


def start(device_option: str, timeout: timedelta = TIMEOUT) -> torch.device:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name; returns this rank's device.

    Args:
        timeout: after which a collective that hangs fails by itself; longer than the watchdog's patience, which knows
            more to tell.

    Raises:
        UserError: ``cuda`` was asked for and there is none, this node has fewer GPUs than ranks, MASTER_ADDR does not
            resolve here, MASTER_PORT is taken, or the ranks do not reach each other within MEET_TIMEOUT.
    """
    device = _choose_device(device_option)
    _check_address(os.environ["MASTER_ADDR"])
    set_variables(device, os.environ)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # The same config, seed and data must give the same losses, bit for bit, on GPUs too.
        torch.use_deterministic_algorithms(True, warn_only=True)
    global _meeting
    _meeting, rank, ranks = _meet()
    backend, store = "nccl" if device.type == "cuda" else "gloo", dist.PrefixStore("ranks", _meeting)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timeout)
    return device


def _meet() -> tuple[dist.Store, int, int]:
    """Where the ranks find each other, once all are there; this rank and their number."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    notice = threading.Timer(NOTICE_S, log.warning, (f"still waiting for the other ranks at {place}",))
    notice.daemon = True
    notice.start()
    try:
        return next(rendezvous("env://", timeout=MEET_TIMEOUT))
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT = {os.environ['MASTER_PORT']}: taken on this host: set MASTER_PORT to a free one, the "
                "same for all ranks"
            ) from None
        raise UserError(
            f"{place}: the ranks did not meet ({str(error).splitlines()[0]}): see whether every node has started its "
            "ranks and whether they reach that address and port (MASTER_ADDR, MASTER_PORT)"
        ) from None
    finally:
        notice.cancel()


def decide(own: str, decision: Callable[[list[str]], str]) -> str:
    """What rank 0 decides on hearing what every rank has to say. All ranks call it.

    It goes through the store where the ranks have met, and through no collective: that might fail, without a word that
    helps, where the ranks do not fit together.

    Raises:
        UserError: a rank says nothing within MEET_TIMEOUT.
    """
    assert _meeting is not None
    store = dist.PrefixStore(f"decision {next(_decisions)}", _meeting)
    store.set(f"rank {dist.get_rank()}", own)
    try:
        if dist.get_rank() == 0:
            said = [store.get(f"rank {rank}").decode() for rank in range(dist.get_world_size())]
            store.set("decision", decision(said))
        return store.get("decision").decode()
    except dist.DistError as error:
        raise UserError(
            f"no word from all ranks ({str(error).splitlines()[0]}): one may have died, see its output"
        ) from None


def finish() -> None:
    """Leave the process group, after a run that ended well; after a failure the other ranks may be gone."""
    dist.destroy_process_group()


def _check_address(address: str) -> None:
    """torch would try for ever."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR = {address!r} does not resolve here ({error.strerror}): set it to a name or address of rank "
            "0's host that every node knows"
        ) from None


def _choose_device(option: str) -> torch.device:
    if option == "cpu" or (option == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1 and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1 and "SLURM_STEP_ID" in os.environ:
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows each process its own GPU alone, as number 0
    if local_rank >= count:
        raise UserError(
            f"device = {option!r}: this rank needs GPU {local_rank} of its node, which has {count}: "
            "start one process a GPU, or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def agree(function: Callable[[], T]) -> T:
    """Call ``function`` on every rank; if it fails on any of them with a UserError, all ranks raise the first one."""
    result: T | None = None
    message: str | None = None
    try:
        result = function()
    except UserError as failure:
        message = str(failure)
    place = f"rank {dist.get_rank()} on {socket.gethostname()}"
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (message, place))
    failed = [(message, place) for message, place in answers if message is not None]
    if failed:
        message, place = failed[0]
        raise UserError(message if len(failed) == len(answers) else f"{message} ({place})", agreed=True)
    return result  # type: ignore[return-value]


def from_rank_0(function: Callable[[], T]) -> T:
    """What the function returns on rank 0, on every rank; if it fails with an OSError, all ranks raise a UserError."""

    def guarded() -> T | None:
        try:
            return function() if dist.get_rank() == 0 else None
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}: the run directory must be writable") from error

    result = [agree(guarded)]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def gather(values: list[float], device: torch.device) -> Tensor:
    """One row of fp64 numbers from every rank, (ranks, len(values)), the same on all ranks and on the CPU."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).cpu()


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether it is set on one of the ranks; the same on all."""
    flags = torch.tensor([float(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
