"""The journal of a run: how each attempt to train it started and ended, one JSON object per line in ``events.jsonl``.

    {"event": "started", "hosts": ["node1", ...], ...}                by rank 0, once it holds the directory's lock
    {"event": "ended", "exit_code": 0, ...}                           by rank 0: finished (0), preempted (85), or
                                                                      ``paused`` (0) with the reason
    {"event": "failed", "exit_code": 1, "rank": 3, "message": ...}    by the rank that knows the cause, or without
                                                                      a rank by slurm/pretrain.sh, if none does

Every event has its time, host and process; ``started`` also has the environment of the attempt. When several ranks
report a failure of one attempt, the first one is the cause. An attempt without an end was killed or is still running.

Version 0.1 wrote the environments into environment.json. That file is still read, but no longer written.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal, Required, Self

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from mythos.errors import FAILED as FAILED_CODE
from mythos.errors import UserError, masked
from mythos.files import open_to_append
from mythos.readers import FILE_BYTES, Count, read_json, read_json_lines
from mythos.run.console import log
from mythos.run.directory import RunDirectory, is_place_for_run
from mythos.run.lock import is_held

STARTED, ENDED, FAILED = "started", "ended", "failed"
MESSAGE_CHARACTERS = 500
"""Longer messages are cut, so that an event remains one short write."""
PACKAGES = ("torch", "deepspeed", "numpy", "tokenizers", "mosaicml-streaming", "mythos")
JOB_VARIABLES = ("SLURM_JOB", "SLURM_RESTART_COUNT", "SLURM_ARRAY_")


class _Attempt(TypedDict, total=False):
    """What is read of the environment of an attempt."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    command: str
    ranks: Count
    expert_parallel_size: Count | None
    slurm: dict[str, str]


class _Event(_Attempt, total=False):
    """What is read of an event."""

    event: Required[Literal["started", "ended", "failed"]]
    host: str
    exit_code: Annotated[int, Field(strict=True, ge=-255, le=255)]
    rank: Count | None
    message: str
    paused: str


_EVENT: TypeAdapter[Any] = TypeAdapter(_Event)
_ATTEMPTS: TypeAdapter[Any] = TypeAdapter(list[_Attempt])


class Journal:
    """A context manager around an attempt that records its start, its end, and the cause if it fails.

    An attempt that fails before it holds the directory's lock (its data may be missing) is recorded, too, unless the
    directory does not exist yet, holds something else, or another process is training there.

    Args:
        directory: the run directory.
        rank: of this process.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory, self.rank = directory, rank
        self._file: BinaryIO | None = None
        """Open from the start on, so that events go to this run even if its directory is moved."""

    def start(self, environment: Mapping[str, Any]) -> None:
        """Record that this attempt holds the lock on the run directory. Raises OSError."""
        self._file = open_to_append(RunDirectory(self.directory).events)
        if self.rank == 0:
            self._append(STARTED, **environment)

    def end(self, exit_code: int, pause: str | None = None) -> None:
        """Record that the run is finished, paused (with the reason), or was preempted and saved."""
        if self.rank == 0:
            try:
                self._append(ENDED, exit_code=exit_code, **({"paused": pause} if pause else {}))
            except OSError as error:  # does not change how the run ended
                log.error(f"{self.directory}: the end of this attempt was not recorded ({error})")

    def fail(self, message: str, exit_code: int) -> None:
        """Record that the run failed, with a cause that this rank knows."""
        with suppress(OSError):  # the disk may be full, and a second error must not hide the first one
            if self._file is not None or (is_place_for_run(self.directory) and not is_held(self.directory)):
                self._append(FAILED, exit_code=exit_code, rank=self.rank, message=message[:MESSAGE_CHARACTERS])

    def _append(self, event: str, **details: Any) -> None:
        if self._file is None:
            append_event(self.directory, event, **details)
        else:
            self._file.write(_line(event, details))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception):
            self._fail_with(error)
        if self._file is not None:
            self._file.close()

    def _fail_with(self, error: Exception) -> None:
        reported_by_rank_0 = isinstance(error, UserError) and error.agreed
        if reported_by_rank_0 and self.rank > 0:
            return
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self.fail(message, error.exit_code if isinstance(error, UserError) else FAILED_CODE)


def environment(hosts: Sequence[str], device: str, precision: str, expert_parallel_size: int) -> dict[str, Any]:
    """Where and with which software this attempt runs.

    Args:
        hosts: the host of each rank.
        device: rank 0's.
        precision: fp32 or bf16.
        expert_parallel_size: 1 for a model without experts.
    """
    return {
        "command": shlex.join(sys.argv),
        "working_directory": _working_directory(),
        "hosts": list(hosts),
        "ranks": len(hosts),
        "device": device,
        "precision": precision,
        "expert_parallel_size": expert_parallel_size,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": package_versions(),
        "git_commit": _git_commit(),
        "slurm": {name: value for name, value in os.environ.items() if name.startswith(JOB_VARIABLES)},
    }


def package_versions() -> dict[str, str | None]:
    """The version of each of ``PACKAGES``; None if it is not installed, like a source tree that is run in place."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def append_event(directory: Path, event: str, **details: Any) -> None:
    """Append a line. Several ranks may append at once: each line is one write, so that lines do not mix.

    Raises:
        OSError: the file cannot be written.
    """
    with open_to_append(RunDirectory(directory).events) as file:
        file.write(_line(event, details))


def has_open_attempt(directory: Path) -> bool:
    """Whether the last attempt has recorded no end: it was killed, or is still running."""
    events = read_events(directory)
    return bool(events) and events[-1]["event"] == STARTED


def _line(event: str, details: Mapping[str, Any]) -> bytes:
    line = {
        "event": event,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "process": os.getpid(),
        **details,
    }
    # A name that is not UTF-8 may be in a message: as an escape in ASCII it would be no valid JSON.
    return masked(json.dumps(line, ensure_ascii=False)).encode("utf-8", errors="replace") + b"\n"


def read_events(directory: Path) -> list[dict[str, Any]]:
    """The events of all attempts, in order. Lines that cannot be read are left out.

    Raises:
        UserError: the file cannot be read.
    """
    return list(read_json_lines(RunDirectory(directory).events, _EVENT, FILE_BYTES))


def read_attempts(directory: Path) -> list[dict[str, Any]]:
    """The environment of each attempt, in order, those of version 0.1 included. Raises UserError like its parts."""
    return attempts_of_version_0_1(directory) + attempts_in(read_events(directory))


def attempts_in(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The environment of each attempt whose start these events record."""
    return [event for event in events if event["event"] == STARTED and "command" in event]


def attempts_of_version_0_1(directory: Path) -> list[dict[str, Any]]:
    """The environments that version 0.1 recorded. Raises UserError if they cannot be read."""
    path = RunDirectory(directory).environment
    found: list[dict[str, Any]] = read_json(path, _ATTEMPTS, "restore or remove it") if path.exists() else []
    return found


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _git_commit() -> str | None:
    """The commit of the source tree, marked if files were changed; None without git or outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
