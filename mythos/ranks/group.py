"""The process group, this rank's device, and agreement between ranks. All functions here are collective."""

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from mythos.errors import UserError
from mythos.network.ports import PortServer, describe, find_port
from mythos.ranks.variables import set_training_variables
from mythos.ranks.world import World
from mythos.run.console import log

T = TypeVar("T")
COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Longer than the watchdog's limit, whose report names the cause, and than a job is usually suspended."""
MEET_TIMEOUT = timedelta(seconds=600)
RETRY_S = 0.1
WAITING_NOTICE_S = 30.0
_store: dist.Store | None = None
_questions = itertools.count()


def start(
    device_option: str, world: World | None = None, check: Callable[[torch.device], None] = lambda device: None
) -> torch.device:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe; returns this rank's device.

    Args:
        world: this rank's place, if the ranks themselves agree on a port; torchrun has opened MASTER_PORT.
        check: called with the device before the first collective, once the ranks can exchange texts. NCCL connects the
            ranks at once, with errors that do not say which rank runs another version or uses another one's GPU.

    Raises:
        UserError: there is no GPU for this rank, MASTER_ADDR does not resolve on this host, no port is free, or the
            ranks do not reach each other within MEET_TIMEOUT.
    """
    device = choose_device(device_option)
    _check_address(os.environ["MASTER_ADDR"])
    user_sets_threads = "OMP_NUM_THREADS" in os.environ
    set_training_variables(device.type, os.environ)
    if not user_sets_threads:  # OpenMP read the variable when torch was imported; child processes will read it
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed chooses the GPU
    global _store
    if world is None or world.launcher == "torchrun":
        _store = _meet_at_master_port()
    else:
        _store = _meet(world)
        os.environ["MASTER_PORT"] = str(_store.port)
    check(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("ranks", _store),
        rank=own_rank(),
        world_size=number_of_ranks(),
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    return device


def own_rank() -> int:
    """The rank of this process, known before the process group exists."""
    return int(os.environ["RANK"])


def number_of_ranks() -> int:
    """The number of ranks, known before the process group exists."""
    return int(os.environ["WORLD_SIZE"])


def _meet_at_master_port() -> dist.Store:
    """Wait for all ranks; returns the store that they share."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    with _notice(address):
        try:
            return next(rendezvous("env://", timeout=MEET_TIMEOUT))[0]
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):
                raise UserError(
                    f"MASTER_PORT = {os.environ['MASTER_PORT']}: in use on this host: set MASTER_PORT to a free port, "
                    "the same for all ranks"
                ) from None
            raise _did_not_meet(address, error) from None


def _meet(world: World) -> dist.TCPStore:
    """Wait for all ranks, whose store is at any free port of rank 0's host; returns it."""
    address, others = f"{world.address}:{describe(world.ports)}", range(1, world.world_size)
    secret = world.secret(world.token or "")
    with _notice(address):
        try:
            port = _find_store(world, secret) if world.rank else 0
            store = dist.TCPStore(
                world.address,
                port,
                world.world_size,
                is_master=world.rank == 0,
                timeout=MEET_TIMEOUT,
                wait_for_workers=False,
            )
            if world.rank:
                store.set(f"rank {world.rank} is here", "")
            elif others:
                with PortServer(world.ports, secret, store.port) as server:
                    if server.port != world.port:
                        log.info(f"port {world.port} is in use on this host: the ranks meet at port {server.port}")
                    store.wait([f"rank {rank} is here" for rank in others], MEET_TIMEOUT)
            return store
        except (dist.DistError, OSError) as error:
            raise _did_not_meet(address, error) from None


def _find_store(world: World, secret: str) -> int:
    """The port of rank 0's store. Raises OSError if rank 0 does not answer within MEET_TIMEOUT."""
    until = time.monotonic() + MEET_TIMEOUT.total_seconds()
    while True:
        try:
            return find_port(world.address, world.ports, secret)
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(RETRY_S)


@contextmanager
def _notice(address: str) -> Iterator[None]:
    """Report after a while that this rank still waits."""
    notice = threading.Timer(WAITING_NOTICE_S, log.warning, (f"still waiting for the other ranks at {address}",))
    notice.daemon = True
    notice.start()
    try:
        yield
    finally:
        notice.cancel()


def _did_not_meet(address: str, error: Exception) -> UserError:
    return UserError(
        f"{address}: the ranks did not meet ({str(error).splitlines()[0]}): check that every node has started its "
        "ranks and that they reach this address and port (MASTER_ADDR, MASTER_PORT)"
    )


def ask_rank_0(own: str, answer: Callable[[list[str]], str]) -> str:
    """Rank 0's answer to the texts of all ranks (in the order of the ranks), returned on every rank.

    The texts are sent through the store and not by a collective, which may fail without a useful message when the ranks
    run different code.

    Raises:
        UserError: a rank sends nothing within MEET_TIMEOUT.
    """
    assert _store is not None
    store = dist.PrefixStore(f"question {next(_questions)}", _store)
    store.set(f"rank {own_rank()}", own)
    try:
        if own_rank() == 0:
            texts = [store.get(f"rank {rank}").decode() for rank in range(number_of_ranks())]
            store.set("answer", answer(texts))
        return store.get("answer").decode()
    except dist.DistError as error:
        raise UserError(
            f"not all ranks respond ({str(error).splitlines()[0]}): one may have died: see its output"
        ) from None


def finish() -> None:
    """Leave the process group after success; after a failure the other ranks may have ended already."""
    dist.destroy_process_group()


def _check_address(address: str) -> None:
    """Raise UserError if MASTER_ADDR does not resolve: torch would retry for ever."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR = {address!r} does not resolve here ({error.strerror}): set it to a name or address of rank "
            "0's host that every node can resolve"
        ) from None


def choose_device(option: str) -> torch.device:
    """The device of this process, by ``device``. Raises UserError if there are too few GPUs."""
    if option == "cpu" or (option == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1:
        # srun --gpus-per-task=1, and wrappers that set CUDA_VISIBLE_DEVICES, show each process only its own GPU, as
        # number 0. If all see the same one, the preflight checks name the ranks.
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise UserError(
            f"device = {option!r}: this rank needs GPU {local_rank} of its node, which has {count}: "
            "start one process per GPU, or set device=cpu"
        )
    return torch.device("cuda", local_rank)


def agree(function: Callable[[], T]) -> T:
    """Call ``function`` on every rank; if it raises a UserError on any rank, all ranks raise the first one."""
    result: T | None = None
    message: str | None = None
    try:
        result = function()
    except UserError as failure:
        message = str(failure)
    place = f"rank {dist.get_rank()} on {socket.gethostname()}"
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (message, place))
    failed = [(message, place) for message, place in outcomes if message is not None]
    if failed:
        message, place = failed[0]
        raise UserError(message if len(failed) == len(outcomes) else f"{message} ({place})", agreed=True)
    return result  # type: ignore[return-value]


def from_rank_0(function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0 and return its result on every rank; an OSError becomes a UserError on all ranks."""

    def guarded() -> T | None:
        try:
            return function() if dist.get_rank() == 0 else None
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}: the run directory must be writable") from error

    result = [agree(guarded)]
    dist.broadcast_object_list(result, src=0)
    return result[0]  # type: ignore[return-value]


def gather(own: Tensor) -> Tensor:
    """The rows ``own`` (numbers,) of every rank, (ranks, numbers), the same on all ranks and on the CPU. Collective."""
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).cpu()


def hosts() -> list[str]:
    """The host of each rank, the same on all ranks. Collective."""
    return gather_objects(socket.gethostname())


def gather_objects(own: T) -> list[T]:
    """The objects of all ranks, the same list on all of them. Collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one rank; the same on all ranks."""
    flags = torch.tensor([float(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
