"""The lock of a run directory: one attempt at a time trains there, and notices when the directory is no longer its own.

    .lock     created exclusively, which every file system supports; says who trains here. Its modification time is
              renewed every BEAT_S, so that others see that its owner is alive whatever host they look from.
    run_id    a random number that the run keeps for ever, and that each of its checkpoints holds, too

The owner also takes an flock on ``.lock``, where the file system has that: while it is held the owner is alive, and
once it is free on the owner's own host, the owner has ended. Otherwise an owner counts as ended when its file has not
changed for STALE_S. This is measured while watching, because the clocks of two hosts differ.

Someone may move a run's directory away and start another run in its place. Every write that could harm that other run
therefore calls ``RunLock.check`` first.
"""

import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO

from mythos.errors import UserError
from mythos.files import read_bytes, write_atomically
from mythos.run.console import log
from mythos.run.directory import NAME_BYTES, RunDirectory
from mythos.run.lock_file import Owner, Sight, create, look

BEAT_S = 5.0
STALE_S = 30.0
"""After this time without a beat an owner counts as ended, for example because its node was lost."""
ENDING_S = 1.0
"""How long a start waits for an attempt that is just ending."""
RESTART_WAIT_S = 300.0
"""How long it waits when Slurm has restarted the job: a file server keeps a lost node's flocks for a while."""
LOOK_S = 0.25
MARKER_STALE_S = 300.0
"""See ``_remove``."""


class DirectoryMissingError(OSError):
    """The run directory was moved away or removed. It may come back, as a disk that was unmounted does."""


class DirectoryTakenError(OSError):
    """Another attempt has taken over the run directory."""


class RunLock(AbstractContextManager["RunLock"]):
    """The lock that this process holds; ``release`` it, or use it in ``with``. Made by ``take``."""

    def __init__(self, directory: Path, run_id: str, file: IO[bytes], owner: Owner) -> None:
        self.directory, self.run_id, self.owner = directory, run_id, owner
        self._file = file
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def keep(self, when_taken: Callable[[str], object]) -> None:
        """Renew the lock in a thread from now on, which calls ``when_taken`` if another attempt has taken it over."""
        thread = threading.Thread(target=self._beat, args=(when_taken,), name="lock", daemon=True)
        thread.start()
        self._thread = thread

    def check(self) -> None:
        """Check that the directory is still this attempt's. A missing ``.lock`` is replaced, such as after a purge.

        Raises:
            DirectoryMissingError: it was moved or removed.
            DirectoryTakenError: another attempt has taken it over.
            OSError: it cannot be read now.
        """
        path = RunDirectory(self.directory).lock
        if look(path) is None:
            if read_run_id(self.directory) != self.run_id:
                raise DirectoryMissingError(
                    errno.ENOENT, "the run's directory was moved or removed", str(self.directory)
                )
            if (file := create(path, self.owner)) is not None:
                self._file.close()
                self._file = file
        sight = look(path)
        if sight is not None and sight.owner not in (self.owner, None):
            raise DirectoryTakenError(errno.EBUSY, f"taken over by {sight.owner}", str(self.directory))

    def release(self) -> None:
        """Stop renewing, and remove the file if it is still this attempt's."""
        self._released.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with suppress(OSError):  # the directory may be gone
            self.check()
            RunDirectory(self.directory).lock.unlink()
        self._file.close()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _beat(self, when_taken: Callable[[str], object]) -> None:
        failing = False
        while not self._released.wait(BEAT_S):
            try:
                self.check()
                os.utime(self._file.fileno())
                failing = False
            except DirectoryTakenError as error:
                when_taken(f"{error.filename}: {error.strerror}: this attempt ends without saving")
                return
            except OSError as error:
                if not failing:
                    log.warning(f"{self.directory}: the lock was not renewed ({error.strerror})")
                failing = True


def take(directory: Path, has_open_attempt: bool = False) -> RunLock:
    """Take the lock of a run directory, once its last owner has ended.

    Args:
        has_open_attempt: the journal shows no end of the last attempt. If ``.lock`` is missing nevertheless, that
            attempt may be running and is given the time to put it back.

    Raises:
        UserError: another process is training here.
        OSError: the directory cannot be written.
    """
    run = RunDirectory(directory)
    if has_open_attempt and look(run.lock) is None:
        log.warning(f"{run.lock}: missing, though the last attempt has not recorded its end: waiting for its owner")
        _wait_until_present(run.lock, 2 * BEAT_S)
    owner = Owner(secrets.token_hex(8), socket.gethostname(), os.getpid(), has_flock=True)
    while (file := create(run.lock, owner)) is None:
        _wait_until_ended(directory, run.lock)
    sight = look(run.lock, with_flock=False)
    assert sight is not None
    assert sight.owner is not None
    return RunLock(directory, _run_id(directory), file, sight.owner)


def is_held(directory: Path) -> bool:
    """Whether a process is training here, from one look: its flock is held, or its last beat was lately.

    A clock that differs from the owner's by more than STALE_S may make this wrong, which ``take`` is never.
    """
    try:
        sight = look(RunDirectory(directory).lock)
    except OSError:  # it cannot be read
        return False
    if sight is None or sight.has_ended:
        return False
    return sight.flock_is_held or time.time() - sight.modified_ns / 1e9 < 2 * STALE_S


def read_run_id(directory: Path) -> str | None:
    """The number of the run; None before its first start, and in runs of version 0.1."""
    try:
        return read_bytes(RunDirectory(directory).run_id, NAME_BYTES).decode("utf-8", errors="replace").strip() or None
    except FileNotFoundError:
        return None


def _wait_until_present(path: Path, wait_s: float) -> None:
    until = time.monotonic() + wait_s
    while look(path) is None and time.monotonic() < until:
        time.sleep(LOOK_S)


def _wait_until_ended(directory: Path, path: Path) -> None:
    """Wait until the owner of the existing file has ended, and remove the file.

    Raises:
        UserError: the owner is alive.
    """
    restarted = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    started = unchanged_since = time.monotonic()
    patience_s = RESTART_WAIT_S if restarted else ENDING_S
    before, logged, has_beaten = None, False, False
    while (sight := look(path)) is not None:
        now = time.monotonic()
        if before is None or sight.slow or (sight.owner, sight.modified_ns) != (before.owner, before.modified_ns):
            has_beaten |= before is not None and sight.modified_ns != before.modified_ns
            before, unchanged_since = sight, now
        if sight.has_ended or (not sight.flock_is_held and now - unchanged_since >= STALE_S):
            _remove(path, sight)
            return
        owner = sight.owner or "another process"
        if (sight.flock_is_held or has_beaten) and now - started >= patience_s:
            raise UserError(f"{directory}: {owner} is training here: {_remedy()}")
        if not logged and (restarted or not sight.flock_is_held):
            wait_s = RESTART_WAIT_S if restarted else STALE_S
            log.warning(f"{directory}: locked by {owner}: waiting up to {wait_s:g} s to see whether it has ended")
            logged = True
        time.sleep(LOOK_S)


def _remedy() -> str:
    remedy = "wait for it, or stop it"
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        remedy += "; tasks of a job array that run at a time need a run.directory each: "
        remedy += "run.directory='runs/${oc.env:SLURM_ARRAY_TASK_ID}'"
    return remedy


def _remove(path: Path, ended: Sight) -> None:
    """Remove the file of an owner that has ended. Of several starts that find it, one does so, and the others wait."""
    marker = path.with_name(f"{path.name}.{ended.owner.key if ended.owner else 'damaged'}")
    try:
        marker.open("xb").close()
    except FileExistsError:
        time.sleep(LOOK_S)
        with suppress(FileNotFoundError):
            if time.time() - marker.stat().st_mtime > MARKER_STALE_S:  # its process was killed at this very moment
                marker.unlink()
        return
    now = look(path)
    if now is not None and (now.owner, now.modified_ns) == (ended.owner, ended.modified_ns):
        path.unlink()
    marker.unlink()


def _run_id(directory: Path) -> str:
    """The number of the run, drawn at its first start with this version."""
    if (found := read_run_id(directory)) is None:
        found = secrets.token_hex(8)
        write_atomically(RunDirectory(directory).run_id, found + "\n")
    return found
