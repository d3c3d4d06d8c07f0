"""Saves checkpoints beside the training: a copy to memory, then a thread that writes, then all ranks agree.

    start     every rank copies its part (the only time that training waits) and hands it to its writer thread
    writing   each thread writes and flushes its files; the ranks tell each other at every step whether they are done
    commit    once all are, rank 0's thread writes the manifest, renames the directory, moves the pointer

Every change from one to the next is agreed at a step's end by all ranks, so a rank that fails to write never leaves
another waiting. One save is under way at a time.
"""

import json
import math
import shutil
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from mythos.checkpoint import layout
from mythos.checkpoint.snapshot import HostBuffer, Snapshot, snapshot
from mythos.checkpoint.tensors import write_tensors
from mythos.config.schema import Checkpoint
from mythos.engine.engine import TrainingEngine
from mythos.errors import SaveError
from mythos.files import hash_file, write_atomically
from mythos.run.console import log
from mythos.run.directory import STATE_FILE

WRITING, COMMITTING = "writing", "committing"
RETRY_S = 2.0


class Receipt(NamedTuple):
    """What a rank tells the others of its part."""

    files: dict[str, layout.Written]
    pieces: dict[str, tuple[int, int, float]]
    failure: str | None


class Saver:
    """Writes the run's checkpoints. Every method but ``pending`` and ``metrics`` is collective.

    Args:
        directory: where the checkpoints lie.
        newest: the complete one that the run goes on from.
        patience: entered while training waits for the disk, with what is done.
    """

    def __init__(
        self,
        directory: Path,
        options: Checkpoint,
        engine: TrainingEngine,
        newest: Path | None = None,
        patience: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.directory, self.options, self.engine = directory, options, engine
        self._newest, self._patience = newest, patience
        self.failures_in_a_row = 0
        self._buffer = HostBuffer(keep=options.mode == "async")
        self._shapes = engine.shapes()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stage: str | None = None
        self._future: Future[Any] | None = None
        self._snapshot: Snapshot | None = None
        self._step, self._state, self._begun_at = 0, "", 0.0
        self._metrics: dict[str, float] = {}

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Save the engine as it is after ``step``, with ``state`` beside it.

        Raises:
            SaveError: this was the last of ``checkpoint.max_failures`` attempts in a row that failed.
        """
        self._start(step, json.dumps(state, indent=2))

    def _start(self, step: int, state: str) -> None:
        begun_at = time.perf_counter()
        self.finish()  # of the save before, should it still be under way
        self._begun_at, self._step, self._state = begun_at, step, state
        self._stage, self._snapshot = WRITING, snapshot(self.engine, self._buffer)
        partial, rank = self._partial, dist.get_rank()
        self._future = self._thread.submit(_write_part, partial, rank, self._snapshot, state)
        if self.options.mode == "sync":
            self.finish()
        self._metrics["checkpoint/stall_seconds"] = time.perf_counter() - begun_at

    def wait_until_saved(self) -> None:
        """Wait for the save under way; while it fails, save again: there will be no other occasion.

        Raises:
            SaveError: it has failed ``checkpoint.max_failures`` times in a row.
        """
        self.finish()
        while self.failures_in_a_row:
            time.sleep(RETRY_S)
            self._start(self._step, self._state)
            self.finish()

    @property
    def pending(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._future is not None and not self._future.done()

    def advance(self, pending_anywhere: bool) -> None:
        """At the end of a step, once the ranks have told each other whether one of them is ``pending``.

        Raises:
            SaveError: this was the last of ``checkpoint.max_failures`` attempts in a row that failed.
        """
        if self._stage == WRITING and not pending_anywhere:
            self._collect()
        elif self._stage == COMMITTING and not pending_anywhere:
            self._conclude()

    def finish(self) -> None:
        """Wait for the save that is under way, if there is one."""
        while self._stage is not None:
            with self._patience(f"waiting for the checkpoint of step {self._step} to be written"):
                if self._future is not None:
                    self._future.exception()  # waits; the error is for the method that reads the result
                self.advance(pending_anywhere=False)

    def metrics(self) -> dict[str, float]:
        """What there is to tell since the last call."""
        told, self._metrics = self._metrics, {}
        return told

    @property
    def _partial(self) -> Path:
        return self.directory / (layout.tag(self._step) + layout.PARTIAL)

    def _collect(self) -> None:
        """All ranks have written: hand their receipts to rank 0's thread, or give up if one has failed."""
        assert self._future is not None
        assert self._snapshot is not None
        first = dist.get_rank() == 0
        receipts: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(_receipt(self._future, self._snapshot), receipts if first else None, dst=0)
        failed = [f"rank {rank}: {r.failure}" for rank, r in enumerate(receipts) if first and r.failure]
        outcome: list[Any] = failed[:1] or [None]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            self._fail(outcome[0])
            return
        self._stage, self._future = COMMITTING, None
        if first:
            self._future = self._thread.submit(self._commit, receipts)

    def _commit(self, receipts: list[Receipt]) -> int:
        manifest = _manifest(self._step, receipts, self._shapes)
        layout.commit(self._partial, manifest)
        layout.remove_old(self.directory, self.options.keep_last, self.options.keep_every)
        return manifest.bytes

    def _conclude(self) -> None:
        outcome: list[Any] = [None, None]
        if self._future is not None:
            try:
                outcome = [self._future.result(), None]
            except OSError as error:
                outcome = [None, _reason(error)]
        dist.broadcast_object_list(outcome, src=0)
        written_bytes, failure = outcome
        if failure:
            self._fail(f"rank 0: {failure}")
            return
        seconds = time.perf_counter() - self._begun_at
        self._stage = self._future = self._snapshot = None
        self.failures_in_a_row = 0
        self._newest = self.directory / layout.tag(self._step)
        self._metrics |= {"checkpoint/save_seconds": seconds, "checkpoint/gigabytes": written_bytes / 1e9}
        self._metrics["checkpoint/failures_in_a_row"] = 0.0
        log.info(f"saved {layout.tag(self._step)}: {written_bytes / 1e6:,.0f} MB in {seconds:.1f} s")

    def _fail(self, reason: str) -> None:
        self._stage = self._future = self._snapshot = None
        if dist.get_rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)  # its space may be what the next attempt lacks
        dist.barrier()  # which may write there again
        self.failures_in_a_row += 1
        self._metrics["checkpoint/failures_in_a_row"] = float(self.failures_in_a_row)
        of = f"{self.failures_in_a_row} of {self.options.max_failures} failures in a row"
        kept = self._newest or "none yet"
        message = f"checkpoint of step {self._step} not saved ({reason}); last complete one: {kept}"
        if self.failures_in_a_row >= self.options.max_failures:
            raise SaveError(
                f"{message}: {of} (checkpoint.max_failures): free space or mend the directory, then start again"
            )
        log.error(f"{message}; trying again, when the next one is due at the latest ({of})")


def _write_part(partial: Path, rank: int, part: Snapshot, state: str) -> dict[str, layout.Written]:
    """Write this rank's files; runs in the thread."""
    partial.mkdir(exist_ok=True)  # without parents: a run directory that vanished must not come back half empty
    files = {
        name: write_tensors(partial / name, tensors, {"format": "pt"})
        for name, tensors in (
            (layout.weights_file(rank), part.weights),
            (layout.optimizer_file(rank), part.optimizer),
        )
    }
    if rank == 0:
        path = partial / STATE_FILE
        write_atomically(path, state)
        files[path.name] = layout.Written(path.stat().st_size, hash_file(path))
    return files


def _receipt(future: "Future[dict[str, layout.Written]]", part: Snapshot) -> Receipt:
    try:
        return Receipt(future.result(), part.pieces, None)
    except OSError as error:
        return Receipt({}, {}, f"{socket.gethostname()}: {_reason(error)}")


def _manifest(step: int, receipts: list[Receipt], shapes: Mapping[str, tuple[int, ...]]) -> layout.Manifest:
    pieces: dict[str, list[tuple[int, int, int, float]]] = {}
    for number, receipt in enumerate(receipts):
        for name, (start, stop, steps) in receipt.pieces.items():
            pieces.setdefault(name, []).append((number, start, stop, steps))
    for name, shape in shapes.items():
        saved = sum(stop - start for _, start, stop, _ in pieces.get(name, ()))
        if saved != math.prod(shape):
            raise RuntimeError(f"{saved} elements of {name} were saved, it has {math.prod(shape)}")
    return layout.Manifest(
        step=step,
        files={name: written for receipt in receipts for name, written in receipt.files.items()},
        parameters={name: layout.Parameter(shapes[name], tuple(found)) for name, found in sorted(pieces.items())},
    )


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
