"""Ends a run one of whose ranks has died or hangs, and says which: collectives alone would wait for it for ever.

Every rank keeps one TCP connection to rank 0. A process that dies closes it, whatever killed it, so rank 0 knows at
once and tells the others. A run that finishes no step for ``limit_s`` hangs: every rank writes the stacks of its
threads to its log, rank 0 names those that no longer answer, and all end. All of it happens in a thread of its own,
which the collective that hangs does not block. Should the interpreter itself be blocked, by a library that never lets
go of its lock, then faulthandler's thread, which needs none, writes the stacks and ends the process.
"""

import faulthandler
import json
import logging
import os
import resource
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from mythos.errors import FAILED, UserError
from mythos.ranks.group import agree
from mythos.ranks.preemption import leave_in_any_case
from mythos.run.console import log

LOOK_EVERY_S = 0.5
PATIENCE_S = 1800.0
"""The least that may go by without progress while a large model is built, kernels are compiled, or a disk is slow."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 20_000}
"""A node that loses its power or network says nothing: after about 20 s its connection counts as closed."""
ANSWER_S = 5.0
"""How long rank 0 waits for the others' stacks; the others wait twice as long for rank 0."""
FROZEN_S = 2.5
"""How long after the limit a frozen interpreter is ended: while the others still wait for its answer."""
VERDICT_S = 2.0
"""How long a rank that has failed waits to hear that another one's death was the cause."""


class _Peer:
    """The other end of a connection."""

    def __init__(self, connection: socket.socket, rank: int, host: str, process: int) -> None:
        self.connection, self.rank, self.host, self.process = connection, rank, host, process
        self.unread = b""
        self.left = False
        """Whether it has taken its leave."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"

    def tell(self, kind: str, text: str = "", exit_code: int = FAILED) -> None:
        try:
            message = {"kind": kind, "text": text, "exit_code": exit_code}
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.left = self.left or kind == "bye"  # its death is noticed where messages are read

    def hear(self) -> list[dict[str, Any]] | None:
        """What it has said; None when it is gone."""
        try:
            received = self.connection.recv(1 << 16)
        except OSError:
            received = b""
        if not received:
            return None
        *lines, self.unread = (self.unread + received).split(b"\n")
        return [json.loads(line) for line in lines]


class Watchdog:
    """Watches from the beginning of a ``with`` block to its end. Opening it is collective.

    Args:
        limit_s: how long the run may go on without a call of ``progress``; at least PATIENCE_S until ``started``.

    Raises:
        UserError: the ranks cannot reach each other.
    """

    def __init__(self, limit_s: float) -> None:
        self.rank = dist.get_rank()
        self._limit_s, self._limit_when_running_s = max(limit_s, PATIENCE_S), limit_s
        self._last_progress, self._doing = time.monotonic(), "starting"
        self.before_end: Callable[[str, int], None] = lambda verdict, exit_code: None
        """Told the verdict and the exit code by the rank that ends the run."""
        self._closed = False
        self._dumped = False
        self._peers = {peer.rank: peer for peer in _connect()}
        self._selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, doing: str) -> None:
        """The run goes on: ``doing`` says with what, for the report should it stop."""
        self._last_progress, self._doing = time.monotonic(), doing

    def started(self) -> None:
        """The first step is done: from now on the run's own limit holds."""
        self._limit_s = self._limit_when_running_s

    @contextmanager
    def patience(self, doing: str) -> Iterator[None]:
        """While something is done that shows no progress and may take long, such as waiting for a slow disk."""
        before, self._limit_s = self._limit_s, max(self._limit_s, PATIENCE_S)
        self.progress(doing)
        yield
        self.progress(doing)
        self._limit_s = before

    def leave(self, verdict: str, exit_code: int) -> None:
        """This rank is about to end its process, for a reason that the others should know."""
        for peer in self._peers.values():
            peer.tell("failed", verdict, exit_code)
        if self.rank == 0:
            self.before_end(verdict, exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        agreed = isinstance(error, UserError) and error.agreed
        if isinstance(error, Exception) and not agreed:
            if not isinstance(error, UserError):
                self._thread.join(VERDICT_S)  # ends the process if this failure has followed from another rank's end
            if isinstance(error, UserError):
                text, exit_code = str(error), error.exit_code
            else:
                text, exit_code = " ".join(f"{type(error).__name__}: {error}".split())[:500], FAILED
            for peer in self._peers.values():
                peer.tell("failed", text, exit_code)
        for peer in self._peers.values():
            peer.tell("bye")
        self._closed = True
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        for peer in self._peers.values():
            peer.connection.close()
        self._selector.close()

    def _watch(self) -> None:
        try:
            while not self._closed:
                self._end_if_frozen()
                self._listen(LOOK_EVERY_S)
                if time.monotonic() - self._last_progress > self._limit_s:
                    self._hang()
        except Exception as error:  # whatever it is, nobody would watch any more
            self._leave(f"the watchdog of rank {self.rank} failed: {error!r}", FAILED, logging.ERROR)

    def _end_if_frozen(self) -> None:
        """From now: if this thread does not come back here, because nobody gets the interpreter's lock any more."""
        if (stream := _stack_streams()[0]) is not None:
            faulthandler.dump_traceback_later(self._limit_s + FROZEN_S, exit=True, file=stream)

    def _listen(self, timeout_s: float) -> list[int]:
        """Act on what the peers say; returns the ranks that have written their stacks."""
        if not self._selector.get_map():
            time.sleep(timeout_s)
            return []
        answered = []
        for key, _ in self._selector.select(timeout_s):
            peer: _Peer = key.data
            messages = peer.hear()
            if messages is None:
                self._selector.unregister(peer.connection)
                if not peer.left and not self._closed and not self._dumped:  # who ends frozen has not answered
                    self._end(f"{peer} died without a word: killed, out of memory, or its node is lost")
            for message in messages or ():
                match message["kind"]:
                    case "bye":
                        peer.left = True
                    case "failed":
                        self._end(f"{peer} failed: {message['text']}", message["exit_code"])
                    case "end":
                        self._leave(message["text"], message["exit_code"], logging.INFO)
                    case "hung":
                        answered.append(peer.rank)
                        if not self._dumped:
                            self._hang({peer.rank})
                    case "dump" if not self._dumped:
                        self._hang()
        return answered

    def _hang(self, answered: set[int] | None = None) -> None:
        """No progress anywhere: write the stacks, find out who still answers, end the run."""
        self._dumped = True
        leave_in_any_case(FAILED, 4 * ANSWER_S)
        _write_stacks(f"no progress for {self._limit_s:g} s (train.watchdog_s), last: {self._doing}")
        question, patience_s = ("dump", ANSWER_S) if self.rank == 0 else ("hung", 2 * ANSWER_S)
        for peer in self._peers.values():
            peer.tell(question)
        silent = set(self._peers) - (answered or set())
        deadline = time.monotonic() + patience_s
        while silent and time.monotonic() < deadline:
            silent -= set(self._listen(LOOK_EVERY_S))
        who = ", ".join(str(self._peers[rank]) for rank in sorted(silent))
        self._end(
            f"no step finished for {self._limit_s:g} s (train.watchdog_s), last: {self._doing}; "
            + (f"no answer from {who}; " if who else "every rank answers; ")
            + "the ranks' stacks are in their logs"
        )

    def _end(self, verdict: str, exit_code: int = FAILED) -> NoReturn:
        for peer in self._peers.values():
            if self.rank == 0 and not peer.left:
                peer.tell("end", verdict, exit_code)
        leave_in_any_case(exit_code)
        if self.rank <= 1:  # rank 1 where rank 0 has died
            self.before_end(verdict, exit_code)
        self._leave(verdict, exit_code, logging.ERROR)

    def _leave(self, verdict: str, exit_code: int, level: int) -> NoReturn:
        leave_in_any_case(exit_code)
        log.log(level, f"mythos: the run ends: {verdict}; what is saved is intact: start again to go on")
        time.sleep(LOOK_EVERY_S)  # for the others to read what they were told
        logging.shutdown()
        os._exit(exit_code)


def _connect() -> list[_Peer]:
    """Rank 0's connections to all others, and theirs to it. Collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return []
    place: list[Any] = [None]
    if rank == 0:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection a rank: the usual 1,024 may not do
        dual = socket.has_dualstack_ipv6()
        server = socket.create_server(
            ("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual, backlog=ranks
        )
        place = [(server.getsockname()[1], secrets.token_hex(16), socket.gethostname(), os.getpid())]
    dist.broadcast_object_list(place, src=0)
    port, token, host, process = place[0]
    if rank == 0:
        with server:
            return agree(lambda: _accept(server, token, ranks - 1))
    return agree(lambda: [_Peer(_dial(port, token), 0, host, process)])


def _dial(port: int, token: str) -> socket.socket:
    address = os.environ["MASTER_ADDR"]
    try:
        connection = socket.create_connection((address, port), timeout=30)
    except OSError as error:
        raise UserError(f"{address}:{port}: rank 0's watchdog cannot be reached ({error}): open the port") from error
    connection.settimeout(None)
    _keep_alive(connection)
    hello = {"token": token, "rank": dist.get_rank(), "host": socket.gethostname(), "process": os.getpid()}
    connection.sendall(json.dumps(hello).encode() + b"\n")
    return connection


def _accept(server: socket.socket, token: str, others: int) -> list[_Peer]:
    peers: list[_Peer] = []
    server.settimeout(60)
    while len(peers) < others:
        try:
            connection, _ = server.accept()
        except OSError as error:
            raise UserError(f"{len(peers)} of {others} ranks reached rank 0's watchdog ({error})") from error
        try:
            connection.settimeout(5)
            hello = json.loads(connection.makefile("rb", buffering=0).readline())
            if hello["token"] != token:
                raise ValueError
            peer = _Peer(connection, hello["rank"], hello["host"], hello["process"])
        except (OSError, ValueError, TypeError, KeyError):
            connection.close()  # somebody else's
            continue
        connection.settimeout(None)
        _keep_alive(connection)
        peers.append(peer)
    return peers


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if hasattr(socket, name):  # Linux has them all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _write_stacks(reason: str) -> None:
    for stream in filter(None, _stack_streams()):
        with suppress(OSError):  # a full disk must not keep the run from ending
            stream.write(f"{reason}; the stacks of all threads:\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)
            stream.flush()


def _stack_streams() -> list[Any]:
    """The rank's log, or its console before there is one."""
    return [h.stream for h in log.handlers if isinstance(h, logging.FileHandler)] or [sys.stderr]
