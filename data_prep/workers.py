"""Workers that do items in any order: this process, processes of its own, or the ranks of a launcher.

Rank 0 hands out the items, one at a time to whoever is free, so that nobody waits for a slow one; it does the work of
a rank in a process of its own. The others reach it where all ranks of the launcher meet, whatever the launcher: no MPI
call is made. Messages are JSON. A worker that fails or dies, and a rank 0 that is gone, end everybody at once.
"""

import contextlib
import json
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
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Annotated, Any, Self, cast

from pydantic import Field, TypeAdapter

from data_prep.parts import HashSource, InspectSource, MakePart, WriteShard
from data_prep.verify_shard import VerifyShard
from mythos.errors import DONE, FAILED, UserError
from mythos.ranks.variables import set_data_variables
from mythos.ranks.world import World

Item = InspectSource | HashSource | MakePart | WriteShard | VerifyShard
_ITEM: TypeAdapter[Item] = TypeAdapter(Annotated[Item, Field(discriminator="kind")])
MEET_TIMEOUT_S = 60
GRACE_S = 5
_LARGEST_MESSAGE_BYTES = 256 << 20


class WorkerLost(UserError):
    """A process of the run died. What is finished stays."""

    exit_code = FAILED


class _Dismissed(Exception):
    """Rank 0 has ended the run, or is gone, while this worker was busy."""


@dataclass
class _Worker:
    connection: Connection
    name: str
    process: BaseProcess | None = None
    item: int | None = None
    introduced: bool = False
    """Whether it has said which rank it is; who has not, is not one of us and gets no work."""


class Workers:
    """A context in which ``run`` does items. Leaving it ends the workers: well, or with the error that is under way."""

    def __init__(self, world: World, processes: int = 1) -> None:
        self._world = world
        self._processes = processes
        self._workers: list[_Worker] = []
        self._listener: socket.socket | None = None
        self._ranks_seen = 1

    def __enter__(self) -> Self:
        set_data_variables(os.environ)
        if self._world.world_size > 1:
            self._listener = _listen(self._world)
        if self._world.world_size > 1 or self._processes > 1:
            for _ in range(self._processes):
                self._start_process()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)

    def end(self, error: BaseException | None) -> None:
        """Tell all workers that the run has ended, and how."""
        exit_code = DONE if error is None else getattr(error, "exit_code", FAILED)
        until = time.monotonic() + (MEET_TIMEOUT_S if error is None else GRACE_S)
        if self._listener is not None:
            # A rank that is late must be told as well, or it would wait for the time limit.
            while self._ranks_seen < self._world.world_size and time.monotonic() < until:
                if wait([self._listener], timeout=0.2):
                    self._accept(self._listener)
            self._listener.close()
            self._listener = None
        workers, self._workers = self._workers, []
        for worker in workers:
            if worker.process is None:
                with contextlib.suppress(OSError):
                    _send(worker.connection, {"exit_code": exit_code})
            else:
                # In the middle of an item when there was an error; what it has not finished is cleared away later.
                worker.process.kill()
                worker.process.join()
        if exit_code != DONE:
            for worker in workers:
                if worker.process is None:
                    _wait_until_told(worker.connection, until)

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
                if worker.introduced and worker.item is None and waiting:
                    worker.item = waiting.popleft()
                    self._hand_over(worker, items[worker.item])
            connections = {worker.connection: worker for worker in self._workers}
            for ready in wait([*connections, *([self._listener] if self._listener else [])]):
                if isinstance(ready, socket.socket):
                    self._accept(ready)
                    continue
                worker = connections[cast(Connection, ready)]
                message = self._receive(worker) if worker.introduced else self._introduce(worker)
                if "progress" in message:
                    progress(message["progress"])
                elif "result" in message and worker.item is not None:
                    number, worker.item = worker.item, None
                    unfinished -= 1
                    yield number, message["result"]

    def _start_process(self) -> None:
        # spawn: threads of pyarrow and tokenizers, or an open MPI, do not survive a fork.
        context = multiprocessing.get_context("spawn")
        own, theirs = context.Pipe()
        process = context.Process(target=_serve_process, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        self._workers.append(_Worker(own, f"worker process {process.pid}", process, introduced=True))

    def _accept(self, listener: socket.socket) -> None:
        accepted, (host, *_) = listener.accept()
        _keep_alive(accepted)
        self._workers.append(_Worker(Connection(accepted.detach()), host))
        self._ranks_seen += 1

    def _introduce(self, worker: _Worker) -> dict[str, Any]:
        try:
            worker.name = f"rank {int(_receive(worker.connection)['rank'])} on {worker.name}"
            worker.introduced = True
        except (OSError, EOFError, ValueError, TypeError, KeyError):
            worker.connection.close()
            self._workers.remove(worker)
        return {}

    def _hand_over(self, worker: _Worker, item: Item) -> None:
        try:
            _send(worker.connection, {"item": _ITEM.dump_python(item, mode="json")})
        except OSError as error:
            raise _lost(worker) from error

    def _receive(self, worker: _Worker) -> dict[str, Any]:
        try:
            message = _receive(worker.connection)
        except (OSError, EOFError) as error:
            raise _lost(worker) from error
        if "mistake" in message:
            raise UserError(message["mistake"])
        if "crash" in message:
            raise RuntimeError(f"{worker.name} failed:\n{message['crash']}")
        return message


def serve(world: World) -> int:
    """Do what rank 0 hands out until it says that the run has ended; the exit code that all ranks share.

    Raises WorkerLost when rank 0 cannot be reached or dies.
    """
    set_data_variables(os.environ)
    connection = _reach(world)
    exit_code = _serve(connection)
    if exit_code is None:
        raise WorkerLost("rank 0 died; run the same command again: what is finished is kept")
    if exit_code != DONE:
        # Rank 0 speaks, and so ends, first. The launcher then sends SIGTERM, and srun would return that of this rank.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with contextlib.suppress(OSError):
            _send(connection, {"told": True})
            connection.poll(GRACE_S)
    return exit_code


def _serve_process(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    set_data_variables(os.environ)
    sys.exit(_serve(connection) or DONE)


def _serve(connection: Connection) -> int | None:
    """None when the other side is gone."""

    def progress(done_bytes: int) -> None:
        try:
            _send(connection, {"progress": done_bytes})
            told = connection.poll()
        except OSError:
            told = True
        if told:
            raise _Dismissed

    while True:
        with contextlib.suppress(_Dismissed):
            try:
                message = _receive(connection)
            except (EOFError, OSError):
                return None
            if "exit_code" in message:
                return int(message["exit_code"])
            try:
                reply = {"result": _ITEM.validate_python(message["item"]).run(progress)}
            except UserError as error:
                reply = {"mistake": str(error)}
            except _Dismissed:
                raise
            except Exception:
                reply = {"crash": traceback.format_exc()}
            try:
                _send(connection, reply)
            except OSError:
                return None


def _wait_until_told(connection: Connection, until: float) -> None:
    """Until the rank knows that the run has ended; what it says before is of no interest any more."""
    with contextlib.suppress(OSError, EOFError):
        while connection.poll(max(until - time.monotonic(), 0)):
            if "told" in _receive(connection):
                return


def _lost(worker: _Worker) -> WorkerLost:
    return WorkerLost(
        f"{worker.name} died, killed or out of memory; run the same command again: what is finished is kept"
    )


def _listen(world: World) -> socket.socket:
    try:
        return socket.create_server(("", world.port), backlog=world.world_size)
    except OSError as error:
        raise UserError(
            f"port {world.port} cannot be opened ({error.strerror}): set MASTER_PORT to a free one"
        ) from None


def _reach(world: World) -> Connection:
    until = time.monotonic() + MEET_TIMEOUT_S
    while True:
        try:
            connected = socket.create_connection((world.address, world.port), timeout=GRACE_S)
            break
        except OSError as error:
            if time.monotonic() > until:
                raise WorkerLost(
                    f"rank 0 does not answer at {world.address}:{world.port} ({error.strerror or error}): set "
                    "MASTER_ADDR to an address of its host that the other nodes reach"
                ) from error
            time.sleep(0.1)
    connected.settimeout(None)
    _keep_alive(connected)
    connection = Connection(connected.detach())
    _send(connection, {"rank": world.rank})
    return connection


def _keep_alive(connected: socket.socket) -> None:
    """So that a node that lost its power is noticed within a minute."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, option):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _send(connection: Connection, message: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _receive(connection: Connection) -> dict[str, Any]:
    message: dict[str, Any] = json.loads(connection.recv_bytes(_LARGEST_MESSAGE_BYTES))
    return message
