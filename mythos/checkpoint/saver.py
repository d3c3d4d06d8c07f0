"""Saves checkpoints while training continues.

    start        every rank copies its part to memory; training waits only for this
    writing      a thread on every rank writes the rank's files; at each step the ranks exchange whether all are done
    committing   rank 0's thread writes the manifest, renames the directory and replaces ``latest``

All ranks move from one stage to the next at the end of the same step, so a rank that cannot write does not leave the
others waiting. Only one save is in progress at a time.
"""

import json
import math
import shutil
import socket
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from mythos.checkpoint import layout
from mythos.checkpoint.manifest import FileRecord, Manifest, SavedParameter, ShardRecord, optimizer_file, weights_file
from mythos.checkpoint.snapshot import HostBuffer, ShardRange, Snapshot, snapshot
from mythos.checkpoint.tensors import write_tensors
from mythos.config.schema import Checkpoint
from mythos.engine.engine import TrainingEngine
from mythos.errors import SaveError, UserError
from mythos.files import write_atomically
from mythos.ranks.group import from_rank_0
from mythos.run.console import log
from mythos.run.directory import PARTIAL_SUFFIX, STATE_FILE
from mythos.run.lock import DirectoryTakenError, RunLock

WRITING, COMMITTING = "writing", "committing"
RETRY_AFTER_S = 2.0


class Receipt(NamedTuple):
    """What a rank reports to rank 0 after writing its files."""

    files: dict[str, FileRecord]
    shards: dict[str, ShardRange]
    failure: str | None


class Saver:
    """Writes the run's checkpoints. Every method except ``pending`` and ``metrics`` is collective.

    Args:
        directory: of the run's checkpoints.
        newest: the complete checkpoint from which the run resumed.
        patience: a context manager entered while training waits for the disk, given a description of the wait.
        lock: of the run directory (rank 0), without which nothing is written or removed there.
    """

    def __init__(
        self,
        directory: Path,
        options: Checkpoint,
        engine: TrainingEngine,
        newest: Path | None = None,
        patience: Callable[[str], AbstractContextManager[Any]] = nullcontext,
        lock: RunLock | None = None,
    ) -> None:
        self.directory, self.options, self.engine = directory, options, engine
        self._newest, self._patience, self._lock = newest, patience, lock
        self.failures_in_a_row = 0
        self._buffer = HostBuffer(keep=options.mode == "async")
        self._shapes = engine.shapes()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stage: str | None = None
        self._future: Future[Any] | None = None
        self._snapshot: Snapshot | None = None
        self._step, self._state, self._started_at = 0, "", 0.0
        self._keep: Collection[int] = ()
        self._metrics: dict[str, float] = {}

    def start(self, step: int, state: Mapping[str, Any], keep: Collection[int] = ()) -> None:
        """Start to save the engine as it is after ``step``, with ``state`` as state.json.

        Args:
            keep: steps of older checkpoints that must not be removed.

        Raises:
            SaveError: this was the last of ``checkpoint.max_failures`` attempts in a row that failed.
        """
        self._keep = keep
        self._start(step, json.dumps(state, indent=2))

    def _start(self, step: int, state: str) -> None:
        started_at = time.perf_counter()
        self.finish()  # the previous save, if it is still in progress
        self._started_at, self._step, self._state = started_at, step, state
        if missing := self.missing_directory():
            self._fail(f"rank 0: {missing}")
            return
        self._stage, self._snapshot = WRITING, snapshot(self.engine, self._buffer)
        self._future = self._thread.submit(_write_files, self._partial, dist.get_rank(), self._snapshot, state)
        if self.options.mode == "sync":
            self.finish()
        self._metrics["checkpoint/stall_seconds"] = time.perf_counter() - started_at

    def wait_until_saved(self) -> None:
        """Wait for the save in progress, and repeat it while it fails, because no later step will save again.

        Raises:
            SaveError: it has failed ``checkpoint.max_failures`` times in a row.
        """
        self.finish()
        while self.failures_in_a_row:
            time.sleep(RETRY_AFTER_S)
            self._start(self._step, self._state)
            self.finish()

    @property
    def pending(self) -> bool:
        """Whether this rank's thread is still working on the current stage."""
        return self._future is not None and not self._future.done()

    def advance(self, pending_anywhere: bool) -> None:
        """Move to the next stage if no rank is ``pending``, which the ranks exchange at each step.

        Raises:
            SaveError: this was the last of ``checkpoint.max_failures`` attempts in a row that failed.
        """
        if self._stage == WRITING and not pending_anywhere:
            self._start_commit()
        elif self._stage == COMMITTING and not pending_anywhere:
            self._finish_commit()

    def finish(self) -> None:
        """Wait for the save in progress, if there is one."""
        while self._stage is not None:
            with self._patience(f"waiting for the checkpoint of step {self._step} to be written"):
                if self._future is not None:
                    self._future.exception()  # waits; `advance` handles the error
                self.advance(pending_anywhere=False)

    def missing_directory(self) -> str | None:
        """Why the run directory cannot be used now; None if it can.

        Raises:
            UserError: another attempt has taken it over.
        """

        def check() -> tuple[str | None, bool]:
            try:
                self._check_directory()
            except OSError as error:
                return _reason(error), isinstance(error, DirectoryTakenError)
            return None, False

        reason, is_taken = from_rank_0(check)
        if is_taken:
            raise UserError(f"{reason}: this attempt ends without saving", agreed=True)
        return reason

    def _check_directory(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def metrics(self) -> dict[str, float]:
        """The metrics since the last call."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    @property
    def _partial(self) -> Path:
        return self.directory / (layout.tag(self._step) + PARTIAL_SUFFIX)

    def _start_commit(self) -> None:
        """All ranks have written: rank 0's thread gets their receipts, unless a rank has failed."""
        assert self._future is not None
        assert self._snapshot is not None
        is_first = dist.get_rank() == 0
        receipts: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(_receipt(self._future, self._snapshot), receipts if is_first else None, dst=0)
        failures = [f"rank {rank}: {r.failure}" for rank, r in enumerate(receipts) if is_first and r.failure]
        first_failure: list[Any] = failures[:1] or [None]
        dist.broadcast_object_list(first_failure, src=0)
        if first_failure[0]:
            self._fail(first_failure[0])
            return
        self._stage, self._future = COMMITTING, None
        if is_first:
            self._future = self._thread.submit(self._commit, receipts)

    def _commit(self, receipts: list[Receipt]) -> int:
        """Runs in rank 0's thread; returns the size of the checkpoint in bytes."""
        manifest = _manifest(self._step, receipts, self._shapes)
        layout.commit(self._partial, manifest, self._check_directory)
        self._check_directory()
        layout.remove_old(self.directory, self.options.keep_last, self.options.keep_every, self._keep)
        return manifest.bytes

    def _finish_commit(self) -> None:
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
        seconds = time.perf_counter() - self._started_at
        self._stage = self._future = self._snapshot = None
        self.failures_in_a_row = 0
        self._newest = self.directory / layout.tag(self._step)
        self._metrics |= {"checkpoint/save_seconds": seconds, "checkpoint/gigabytes": written_bytes / 1e9}
        self._metrics["checkpoint/failures_in_a_row"] = 0.0
        log.info(f"saved {layout.tag(self._step)}: {written_bytes / 1e6:,.0f} MB in {seconds:.1f} s")

    def _fail(self, reason: str) -> None:
        self._stage = self._future = self._snapshot = None
        if dist.get_rank() == 0:
            with suppress(OSError):
                self._check_directory()
                shutil.rmtree(self._partial, ignore_errors=True)  # the next attempt may need its space
        dist.barrier()  # no rank writes to the directory again before it is removed
        self.failures_in_a_row += 1
        self._metrics["checkpoint/failures_in_a_row"] = float(self.failures_in_a_row)
        count = f"{self.failures_in_a_row} of {self.options.max_failures} failures in a row"
        message = (
            f"checkpoint of step {self._step} not saved ({reason}); last complete one: {self._newest or 'none yet'}"
        )
        if self.failures_in_a_row >= self.options.max_failures:
            raise SaveError(
                f"{message}: {count} (checkpoint.max_failures): free space or repair the directory, then start again"
            )
        log.error(f"{message}; trying again when the next one is due, or at the end ({count})")


def _write_files(partial: Path, rank: int, part: Snapshot, state: str) -> dict[str, FileRecord]:
    """Write this rank's files; runs in the thread."""
    partial.mkdir(exist_ok=True)  # without parents: a run directory that was removed must not be recreated in part
    files = {
        name: write_tensors(partial / name, tensors)
        for name, tensors in (
            (weights_file(rank), part.weights),
            (optimizer_file(rank), part.optimizer),
        )
    }
    if rank == 0:
        path = partial / STATE_FILE
        write_atomically(path, state)
        files[path.name] = FileRecord.of(path)
    return files


def _receipt(future: "Future[dict[str, FileRecord]]", part: Snapshot) -> Receipt:
    try:
        return Receipt(future.result(), part.shards, None)
    except OSError as error:
        return Receipt({}, {}, f"{socket.gethostname()}: {_reason(error)}")


def _manifest(step: int, receipts: list[Receipt], shapes: Mapping[str, tuple[int, ...]]) -> Manifest:
    shards: dict[str, list[ShardRecord]] = {}
    matrices: dict[str, tuple[int, int] | None] = {}
    for number, receipt in enumerate(receipts):
        for name, shard in receipt.shards.items():
            shards.setdefault(name, []).append(ShardRecord(number, shard.start, shard.stop, shard.optimizer_steps))
            matrices[name] = shard.matrix
    for name, shape in shapes.items():
        saved = sum(shard.stop - shard.start for shard in shards.get(name, ()))
        if saved != math.prod(shape):
            raise RuntimeError(f"{saved} elements of {name} were saved, it has {math.prod(shape)}")
    return Manifest(
        step=step,
        files={name: record for receipt in receipts for name, record in receipt.files.items()},
        parameters={
            name: SavedParameter(shapes[name], tuple(found), matrices[name]) for name, found in sorted(shards.items())
        },
    )


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
