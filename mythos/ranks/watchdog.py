"""Ends a run when one of its ranks dies or hangs, and reports which one; otherwise collectives would wait for ever.

Every rank keeps a connection to rank 0. The end of a process closes its connection, whatever ended it, so rank 0
notices at once and informs the others. A run that makes no progress for ``limit_s`` hangs: every rank writes the stacks
of its threads to its log, rank 0 names the ranks that do not respond, and all exit. This happens in a separate thread,
which a blocked collective does not block. If a library holds the interpreter's lock, that thread is blocked, too; see
``mythos.ranks.frozen``. The time in which the whole job is suspended, as by `scontrol suspend`, does not count.
"""

import logging
import os
import resource
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn, Self

import torch.distributed as dist

from mythos.errors import FAILED, UserError
from mythos.network.messages import Channel, Listener, Peer, connect, interface
from mythos.ranks import stacks
from mythos.ranks.exits import exit_now, exit_within, prepare_exit
from mythos.ranks.frozen import FrozenWatch
from mythos.ranks.group import agree
from mythos.run.console import log
from mythos.run.journal import Journal

POLL_S = 0.5
SLOW_LIMIT_S = 1800.0
"""The least limit while a large model is built, kernels are compiled, or a slow disk is written."""
SHARES_PER_LIMIT = 8
"""How often within the limit a rank that makes progress informs the others."""
CONNECT_TIMEOUT_S = 60.0
RESPONSE_S = 5.0
"""How long rank 0 waits for the other ranks to write their stacks; the others wait twice as long for rank 0."""
FROZEN_S = 2.5
"""How long after the limit a process with a blocked interpreter is ended: while the others still wait for it."""
SUSPENDED_S = 5.0
"""Between two looks of the watchdog's thread, which are POLL_S apart in a process that runs."""
DIAGNOSIS_S = 2.0
"""How long a failed rank waits to learn whether the death of another rank was the cause."""
ERROR_CHARACTERS = 500


class Watchdog:
    """Watches the run inside a ``with`` block. Creating it is collective.

    Args:
        limit_s: the longest time without a call of ``progress`` on any rank; at least SLOW_LIMIT_S until ``started``.
        journal: where the rank that ends the run records the cause.

    Raises:
        UserError: the ranks cannot reach each other.
    """

    def __init__(self, limit_s: float, journal: Journal | None = None) -> None:
        self.rank = dist.get_rank()
        self._journal = journal
        self._limit_s, self._limit_after_start_s = max(limit_s, SLOW_LIMIT_S), limit_s
        self._own_progress, self._activity = time.monotonic(), "starting"
        self._last_progress = self._shared_progress = self._own_progress
        """The last progress of any rank, as far as known here, and what this rank has told the others."""
        self._closed = False
        self._hangs = False
        self._peers = {peer.rank: peer for peer in _connect_to_rank_0()}
        self._finished: set[int] = set()
        """The ranks that have announced the end of their connection."""
        self._selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            self._selector.register(peer.channel, selectors.EVENT_READ, peer)
        self._frozen = FrozenWatch()
        prepare_exit()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def progress(self, activity: str) -> None:
        """Report progress; ``activity`` says what the run does next, for the report in case it hangs."""
        self._own_progress, self._activity = time.monotonic(), activity
        self._last_progress = self._own_progress

    def started(self) -> None:
        """The first step is done: from now on the run's own limit applies."""
        self._limit_s = self._limit_after_start_s

    @contextmanager
    def patience(self, activity: str) -> Iterator[None]:
        """Allow SLOW_LIMIT_S for an activity that reports no progress, such as waiting for a slow disk."""
        before, self._limit_s = self._limit_s, max(self._limit_s, SLOW_LIMIT_S)
        self.progress(activity)
        yield
        self.progress(activity)
        self._limit_s = before

    def report_failure(self, cause: str, exit_code: int) -> None:
        """Inform the other ranks that this one is about to end its process. Rank 0 records the cause."""
        self._send_all("failed", cause, exit_code)
        if self.rank == 0 and self._journal is not None:
            self._journal.fail(cause, exit_code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError):
            if not error.agreed:
                self._send_all("failed", str(error), error.exit_code)
        elif isinstance(error, Exception):
            # If this error follows from the death of another rank, the watchdog's thread ends the process here.
            self._thread.join(DIAGNOSIS_S)
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self._send_all("failed", text[:ERROR_CHARACTERS], FAILED)
        self._send_all("finished")
        self._closed = True
        self._thread.join()
        self._frozen.close()
        for peer in self._peers.values():
            peer.channel.close()
        self._selector.close()

    def _watch(self) -> None:
        try:
            looked = time.monotonic()
            while not self._closed:
                self._frozen.beat(self._limit_s + FROZEN_S, stacks.stacks_stream())
                self._receive(POLL_S)
                self._share_progress()
                now = time.monotonic()
                if (gap_s := now - looked) > SUSPENDED_S:
                    self._last_progress += gap_s
                    log.warning(f"this process did not run for {gap_s:.0f} s (suspended?): training continues")
                looked = now
                if now - self._last_progress > self._limit_s:
                    self._end_hanging_run()
        except Exception as error:  # of any kind: without this thread the run would be unwatched
            self._exit(f"the watchdog of rank {self.rank} failed: {error!r}", FAILED, logging.ERROR)

    def _share_progress(self) -> None:
        """Inform the other ranks of progress, so that those that wait for this rank do not take it for a hang."""
        known = self._last_progress if self.rank == 0 else self._own_progress  # rank 0 passes on that of the others
        if known - self._shared_progress >= self._limit_s / SHARES_PER_LIMIT:
            self._shared_progress = known
            self._send_all("progress", age_s=time.monotonic() - known)

    def _send_all(self, kind: str, text: str = "", exit_code: int = FAILED, age_s: float = 0.0) -> None:
        for peer in self._peers.values():
            if peer.rank not in self._finished:
                try:
                    peer.channel.send({"kind": kind, "text": text, "exit_code": exit_code, "age_s": age_s})
                except OSError:  # `_receive` handles a dead peer; after "finished" a peer may end
                    if kind == "finished":
                        self._finished.add(peer.rank)

    def _receive(self, timeout_s: float) -> set[int]:
        """Act on the peers' messages; returns the ranks that have written their stacks."""
        if not self._selector.get_map():
            time.sleep(timeout_s)
            return set()
        responding = set()
        for key, _ in self._selector.select(timeout_s):
            peer: Peer = key.data
            try:
                messages = peer.channel.receive_available()
            except OSError:
                self._selector.unregister(peer.channel)
                # In a run that hangs, a rank whose interpreter is blocked ends like this: it has not responded.
                if peer.rank not in self._finished and not self._closed and not self._hangs:
                    self.end_run(f"{peer} died: it was killed, ran out of memory, or its node was lost")
                continue
            for message in messages:
                match message["kind"]:
                    case "progress":
                        self._last_progress = max(self._last_progress, time.monotonic() - message["age_s"])
                    case "finished":
                        self._finished.add(peer.rank)
                    case "failed":
                        self.end_run(f"{peer} failed: {message['text']}", message["exit_code"])
                    case "exit":
                        self._exit(message["text"], message["exit_code"], logging.INFO)
                    case "stacks written":
                        responding.add(peer.rank)
                        if not self._hangs:
                            self._end_hanging_run({peer.rank})
                    case "write stacks" if not self._hangs:
                        self._end_hanging_run()
        return responding

    def _end_hanging_run(self, responding: set[int] | None = None) -> None:
        """Write the stacks, find out which ranks respond, and end the run."""
        self._hangs = True
        exit_within(FAILED, 4 * RESPONSE_S)
        state = f"no step finished for {self._limit_s:g} s (train.watchdog_s), last activity: {self._activity}"
        stacks.write_stacks(state)
        self._send_all("write stacks" if self.rank == 0 else "stacks written")
        missing = set(self._peers) - self._finished - (responding or set())
        deadline = time.monotonic() + (RESPONSE_S if self.rank == 0 else 2 * RESPONSE_S)
        while missing and time.monotonic() < deadline:
            missing -= self._receive(POLL_S)
        names = ", ".join(str(self._peers[rank]) for rank in sorted(missing))
        result = f"no response from {names}" if names else "every rank responds"
        self.end_run(f"{state}; {result}; the stacks of the ranks are in their logs")

    def end_run(self, cause: str, exit_code: int = FAILED) -> NoReturn:
        """End the processes of all ranks; on rank 0, or where rank 0 has died."""
        if self.rank == 0:
            self._send_all("exit", cause, exit_code)
        exit_within(exit_code)
        if self.rank <= 1 and self._journal is not None:  # rank 1 if rank 0 has died
            self._journal.fail(cause, exit_code)
        self._exit(cause, exit_code, logging.ERROR)

    def _exit(self, cause: str, exit_code: int, level: int) -> NoReturn:
        exit_within(exit_code)
        log.log(level, f"mythos: the run ends: {cause}; the last complete checkpoint is intact: start again to resume")
        time.sleep(POLL_S)  # for the other ranks to receive what was sent to them
        exit_now(exit_code)


def _connect_to_rank_0() -> list[Peer]:
    """On rank 0 the connections to all other ranks, elsewhere the one to rank 0. Collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if ranks == 1:
        return []
    offer: list[Any] = [None]
    if rank == 0:
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))  # 1,024 is usual, and each rank needs one
        one_host = os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"]
        address = interface(os.environ["MASTER_ADDR"], one_host)
        listener = Listener(secrets.token_hex(16), ranks - 1, address)
        offer = [
            (address or os.environ["MASTER_ADDR"], listener.port, listener.token, socket.gethostname(), os.getpid())
        ]
    dist.broadcast_object_list(offer, src=0)
    address, port, token, host, process = offer[0]
    if rank == 0:
        with listener:
            return agree(lambda: _accept(listener, ranks - 1))
    return agree(lambda: [Peer(_connect(address, port, token, rank), 0, host, process)])


def _connect(address: str, port: int, token: str, rank: int) -> Channel:
    try:
        return connect(address, port, token, rank, CONNECT_TIMEOUT_S)
    except OSError as error:
        raise UserError(f"{address}:{port}: rank 0's watchdog cannot be reached ({error}): open the port") from error


def _accept(listener: Listener, others: int) -> list[Peer]:
    peers: list[Peer] = []
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while len(peers) < others:
        if (left_s := deadline - time.monotonic()) <= 0:
            raise UserError(
                f"{len(peers)} of {others} ranks reached rank 0's watchdog in {CONNECT_TIMEOUT_S:g} s: check that they "
                f"reach port {listener.port} of its host"
            )
        peers += listener.accept(left_s)
    return peers
