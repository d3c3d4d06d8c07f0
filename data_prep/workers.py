"""Workers that process items in any order: this process, local processes, or the ranks of a launcher.

Rank 0 gives items, one at a time, to any worker that is free, so a slow worker does not delay the others. A local
process works in place of rank 0 itself. The other ranks connect to rank 0 at the address where the launcher's ranks
meet; no MPI call is made. If a worker fails or dies, or rank 0 ends, all of them end.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Annotated, Any, Self

from pydantic import Field, TypeAdapter

from data_prep.parts import HashSource, InspectSource, MakePart
from data_prep.shards import WriteShard
from data_prep.verify_shard import VerifyShard
from mythos.errors import DONE, FAILED, UserError
from mythos.network.messages import PATIENT_KEEP_ALIVE, Channel, Listener, connect, interface
from mythos.network.ports import PortServer, describe, find_port
from mythos.ranks.token import REMEDY, new_token, publish_token, read_token, remove_token
from mythos.ranks.variables import set_data_variables
from mythos.ranks.world import World

Item = InspectSource | HashSource | MakePart | WriteShard | VerifyShard
_ITEM: TypeAdapter[Item] = TypeAdapter(Annotated[Item, Field(discriminator="kind")])
MEET_TIMEOUT_S = 120.0
GRACE_S = 5.0
RETRY_S = 0.1
AGAIN = "run the same command again: finished parts are kept"


class WorkerLost(UserError):
    """A process of the job died."""

    exit_code = FAILED


class _Dismissed(Exception):
    """Rank 0 has ended the job, or has died, while this worker was busy."""


@dataclass
class _Worker:
    channel: Channel
    name: str
    process: BaseProcess | None = None
    """None if the worker is another rank."""
    item: int | None = None
    """Number of the item that it is processing."""


class Workers:
    """A context in which ``run`` processes items. Leaving it ends the workers."""

    def __init__(self, world: World, processes: int = 1) -> None:
        self._world = world
        self._processes = processes
        self._workers: list[_Worker] = []
        self._listener: Listener | None = None
        self._port_server: PortServer | None = None

    def __enter__(self) -> Self:
        set_data_variables(os.environ)
        if self._world.world_size > 1:
            one_host = self._world.local_world_size == self._world.world_size
            # Other hosts may resolve the name of this one to another of its interfaces.
            address = interface(self._world.address, one_host) if one_host else None
            others = self._world.world_size - 1
            self._listener = Listener(new_token(self._world), others, address, PATIENT_KEEP_ALIVE)
            secret = self._world.secret(self._listener.token)
            self._port_server = PortServer(self._world.ports, secret, self._listener.port)
            publish_token(self._world, self._listener.token)
        if self._world.world_size > 1 or self._processes > 1:
            for _ in range(self._processes):
                self._start_process()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Send all workers the end of the job and its exit code."""
        exit_code = DONE if error is None else getattr(error, "exit_code", FAILED)
        until = time.monotonic() + (MEET_TIMEOUT_S if error is None else GRACE_S)
        if self._listener is not None and self._port_server is not None:
            # Ranks that connect late must be informed, too: otherwise they would wait until they time out.
            while len(self._ranks()) < self._world.world_size - 1 and time.monotonic() < until:
                self._accept(self._listener, timeout_s=RETRY_S)
            self._port_server.close()
            self._listener.close()
            self._listener = self._port_server = None
            with contextlib.suppress(OSError):  # the next job with this address and port replaces the file
                remove_token(self._world)
        ranks = self._ranks()
        for worker in self._workers:
            if worker.process is not None:
                # After an error it may be working on an item, whose unfinished files are removed later.
                worker.process.kill()
                worker.process.join()
        self._workers = []
        for rank in ranks:
            with contextlib.suppress(OSError):
                rank.channel.send({"exit_code": exit_code})
        if exit_code != DONE:
            for rank in ranks:
                _wait_until_informed(rank.channel, until)

    def run(self, items: Sequence[Item], progress: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
        """(number of the item, result) as they are finished. Raises what an item raised, and WorkerLost."""
        if not self._workers and self._listener is None:
            for number, item in enumerate(items):
                yield number, item.run(progress)
            return
        waiting = deque(range(len(items)))
        unfinished = len(items)
        while unfinished:
            for worker in self._workers:
                if worker.item is None and waiting:
                    worker.item = waiting.popleft()
                    _hand_over(worker, items[worker.item])
            for worker in self._wait():
                for message in _receive(worker):
                    if "progress" in message:
                        progress(message["progress"])
                    elif "result" in message and worker.item is not None:
                        number, worker.item = worker.item, None
                        unfinished -= 1
                        yield number, message["result"]

    def _wait(self) -> list[_Worker]:
        """The workers with a message, after waiting for one or for the arrival of a rank."""
        by_descriptor = {worker.channel.fileno(): worker for worker in self._workers}
        listening = [] if self._listener is None else [self._listener.fileno()]
        ready = wait([*by_descriptor, *listening])
        if self._listener is not None and self._listener.fileno() in ready:
            self._accept(self._listener)
        return [worker for descriptor, worker in by_descriptor.items() if descriptor in ready]

    def _accept(self, listener: Listener, timeout_s: float = 0.0) -> None:
        self._workers += [_Worker(peer.channel, str(peer)) for peer in listener.accept(timeout_s)]

    def _ranks(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.process is None]

    def _start_process(self) -> None:
        # spawn, because threads of pyarrow and tokenizers and an initialised MPI do not survive a fork.
        own, other = socket.socketpair()
        process = multiprocessing.get_context("spawn").Process(target=_serve_process, args=(other,), daemon=True)
        # Ctrl-C reaches this process, too, which then ends the worker. The worker has the mask from its first moment.
        resource_tracker.ensure_running()  # else done by `start`, which unblocks the signal
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        other.close()
        self._workers.append(_Worker(Channel(own), f"worker process {process.pid}", process))


def serve(world: World) -> int:
    """Process the items that rank 0 distributes until it ends the job; returns the exit code that all ranks share.

    Raises:
        WorkerLost: rank 0 cannot be reached or dies.
    """
    set_data_variables(os.environ)
    channel = _connect(world)
    exit_code = _serve(channel)
    if exit_code is None:
        raise WorkerLost(f"rank 0 died; {AGAIN}")
    if exit_code != DONE:
        # Rank 0 reports the error and exits first. The launcher then sends SIGTERM; if it ended this rank, srun would
        # return 143 instead of the error's exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            channel.send({"informed": True})
            channel.readable(GRACE_S)
    return exit_code


def _serve_process(connection: socket.socket) -> None:
    set_data_variables(os.environ)
    sys.exit(_serve(Channel(connection)) or DONE)


def _serve(channel: Channel) -> int | None:
    """Process items; returns the exit code of the job, or None if the process that distributes them has died."""

    def progress(done_bytes: int) -> None:
        try:
            channel.send({"progress": done_bytes})
        except OSError as error:
            raise _Dismissed from error
        if channel.readable():  # the end of the job: there is no other message while this worker is busy
            raise _Dismissed

    while True:
        with contextlib.suppress(_Dismissed):
            try:
                message = channel.receive()
            except OSError:
                return None
            if "exit_code" in message:
                return int(message["exit_code"])
            try:
                reply = {"result": _ITEM.validate_python(message["item"]).run(progress)}
            except UserError as error:
                reply = {"user_error": str(error)}
            except _Dismissed:
                raise
            except Exception:
                reply = {"traceback": traceback.format_exc()}
            try:
                channel.send(reply)
            except OSError:
                return None


def _hand_over(worker: _Worker, item: Item) -> None:
    try:
        worker.channel.send({"item": _ITEM.dump_python(item, mode="json")})
    except OSError as error:
        raise _lost(worker) from error


def _receive(worker: _Worker) -> list[dict[str, Any]]:
    try:
        messages = worker.channel.receive_available()
    except OSError as error:
        raise _lost(worker) from error
    for message in messages:
        if "user_error" in message:
            raise UserError(message["user_error"])
        if "traceback" in message:
            raise RuntimeError(f"{worker.name} failed:\n{message['traceback']}")
    return messages


def _lost(worker: _Worker) -> WorkerLost:
    return WorkerLost(f"{worker.name} died: it was killed or ran out of memory; {AGAIN}")


def _wait_until_informed(channel: Channel, until: float) -> None:
    """Wait until the rank has received the exit code; its messages from before are ignored."""
    with contextlib.suppress(OSError):
        while "informed" not in channel.receive(max(until - time.monotonic(), 0.0)):
            continue


def _connect(world: World) -> Channel:
    until = time.monotonic() + MEET_TIMEOUT_S
    while True:
        try:
            # Without a timeout: rank 0 accepts connections only while it distributes items.
            token = read_token(world)
            port = find_port(world.address, world.ports, world.secret(token))
            return connect(world.address, port, token, world.rank, None, PATIENT_KEEP_ALIVE)
        except OSError as error:
            if time.monotonic() > until:
                raise WorkerLost(
                    f"rank 0 does not respond at {world.address}:{describe(world.ports)} ({error}): check that the "
                    f"other nodes reach that address (MASTER_ADDR) and have the same home directory, or {REMEDY}"
                ) from error
            time.sleep(RETRY_S)
