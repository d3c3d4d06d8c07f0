"""Fetching whole files: from a path (a network file system), or from an object store through mosaicml-streaming.

The library knows s3, gs, oci, azure, azure-dl, hf, dbfs, sftp and alipan, each with the credentials of its own tools.
"""

import errno
import importlib
import importlib.util
import sys
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from mythos.errors import UserError

SILENCE_S = 15.0
"""A download that brings nothing for so long is given up: it must not look like a run that hangs. The libraries have
time limits of their own, of many minutes in all."""
GIVE_UP_AFTER_S = 10.0
"""No further attempt after this: none after a silence."""
LOOK_EVERY_S = 0.2
RETRY_PAUSES_S = (1.0, 4.0)
"""Before the second and the third attempt at an object store."""
_COPY_BYTES = 1 << 23
_LOCAL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}

_threads = threading.local()
_import_lock = threading.Lock()


def is_object_store(directory: str) -> bool:
    """Whether this is the address of an object store and not a path."""
    return "://" in directory or directory.startswith("dbfs:/")


def fetch(origin: str, target: Path) -> None:
    """Copy a file to ``target``, in a directory of its own. A failure may leave a part of it.

    Raises:
        UserError: the origin cannot be read, after some attempts where it is an object store.
        OSError: the target cannot be written.
    """
    if not is_object_store(origin):
        _copy(Path(origin), target)
        return
    until = time.monotonic() + GIVE_UP_AFTER_S
    for pause_s in (*RETRY_PAUSES_S, None):
        try:
            _download(origin, target)
            if not target.exists():  # for some stores the library says nothing of what was refused
                raise RuntimeError("the store sent nothing")
            return
        except UserError:
            raise
        except Exception as error:  # each library has its own
            target.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in _LOCAL_DISK:
                raise
            if pause_s is None or time.monotonic() > until:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
                raise UserError(
                    f"{origin}: cannot be fetched ({reason}); check the address, the credentials and that it is there"
                ) from error
            time.sleep(pause_s)


def _copy(origin: Path, target: Path) -> None:
    with target.open("wb") as file:
        for chunk in _chunks(origin):
            file.write(chunk)


def _chunks(origin: Path) -> Iterator[bytes]:
    try:
        with origin.open("rb") as source:
            while chunk := source.read(_COPY_BYTES):
                yield chunk
    except OSError as error:
        raise UserError(f"{origin}: cannot be fetched ({error.strerror}); check that the data is there") from error


def _download(origin: str, target: Path) -> None:
    """One attempt, in this thread's own downloading thread; all that it writes lies in the directory of ``target``.

    Raises:
        TimeoutError: the store went silent.
        Exception: what its library raises.
    """
    worker = _threads.__dict__.get("worker")
    if worker is None:
        worker = _threads.worker = _Worker()
    outcome = worker.begin(origin, target)
    received, heard_at = -1, time.monotonic()
    while not wait([outcome], timeout=LOOK_EVERY_S).done:
        now = _bytes_below(target.parent)
        if now != received:
            received, heard_at = now, time.monotonic()
        elif time.monotonic() > heard_at + SILENCE_S:
            del _threads.worker  # it may wait for ever
            raise TimeoutError(f"nothing has come for {SILENCE_S:g} s")
    outcome.result()


def _bytes_below(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # it has just got its final name
            total += path.stat().st_size
    return total


class _Worker:
    """A thread that downloads, and keeps its clients for the next time. A daemon, which keeps no process from ending:
    the threads of a ``ThreadPoolExecutor`` would."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[str, Path, Future[None]]] = SimpleQueue()
        threading.Thread(target=self._work, name="download", daemon=True).start()

    def begin(self, origin: str, target: Path) -> "Future[None]":
        """Download, and say in the future how it went."""
        outcome: Future[None] = Future()
        self._tasks.put((origin, target, outcome))
        return outcome

    def _work(self) -> None:
        clients: dict[str, Any] = {}
        while True:
            origin, target, outcome = self._tasks.get()
            try:
                _downloader(origin, clients)(origin, str(target), SILENCE_S)
                outcome.set_result(None)
            except BaseException as error:
                outcome.set_exception(error)


def _downloader(origin: str, clients: dict[str, Any]) -> Any:
    """The library's download function for this address, of a client that is kept for each kind of store."""
    module = _download_module()
    scheme = "dbfs-uc" if origin.startswith("dbfs:/Volumes") else origin.split(":")[0]
    known = sorted(filter(None, module.DOWNLOADER_MAPPINGS))
    if scheme not in known:
        raise UserError(f"{origin}: unknown kind of store {scheme!r}; known are {', '.join(known)}, or give a path")
    if scheme not in clients:
        try:
            clients[scheme] = module.DOWNLOADER_MAPPINGS[scheme]()
        except ImportError as error:
            raise UserError(f"{origin}: {scheme} needs a package that is missing ({error}); install it") from error
    return clients[scheme].download


def _download_module() -> Any:
    """``streaming.base.storage.download`` alone: `import streaming` would take 5 s and 840 MB, this 15 ms.

    Its packages are imported as empty shells, which are taken away again so that a later `import streaming` is whole.
    """
    name = "streaming.base.storage.download"
    with _import_lock:
        if name in sys.modules:
            return sys.modules[name]
        if "streaming" in sys.modules:
            return importlib.import_module(name)
        spec = importlib.util.find_spec("streaming")
        assert spec is not None
        assert spec.submodule_search_locations
        root = Path(spec.submodule_search_locations[0])
        for package in ("streaming", "streaming.base", "streaming.base.format", "streaming.base.storage"):
            shell = types.ModuleType(package)
            shell.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
            sys.modules[package] = shell
        try:
            return importlib.import_module(name)
        finally:
            for module in [key for key in sys.modules if key.split(".")[0] == "streaming" and key != name]:
                del sys.modules[module]
