"""Fetching whole files: from a path (a network file system), or from an object store through mosaicml-streaming.

The library knows s3, gs, oci, azure, azure-dl, hf, dbfs, sftp and alipan, each with the credentials of its own tools.
"""

import errno
import importlib
import importlib.util
import os
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mythos.errors import UserError

CONNECT_TIMEOUT_S, TIMEOUT_S = 5.0, 15.0
GIVE_UP_AFTER_S = 20.0
"""No further attempt after this: a store that swallows what it is sent must not look like a run that hangs."""
RETRY_PAUSES_S = (1.0, 4.0)
"""Before the second and the third attempt at an object store."""
_COPY_BYTES = 1 << 23
_LOCAL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}

_clients = threading.local()
_import_lock = threading.Lock()


def is_object_store(directory: str) -> bool:
    """Whether this is the address of an object store and not a path."""
    return "://" in directory or directory.startswith("dbfs:/")


def fetch(origin: str, target: Path) -> None:
    """Copy a file to ``target``, which must not exist. A failure may leave a part of it.

    Raises:
        UserError: the origin cannot be read, after some attempts where it is an object store.
        OSError: the target cannot be written.
    """
    if not is_object_store(origin):
        _copy(Path(origin), target)
        return
    download, until = _downloader(origin), time.monotonic() + GIVE_UP_AFTER_S
    for pause_s in (*RETRY_PAUSES_S, None):
        try:
            download(origin, str(target), TIMEOUT_S)
            if not target.exists():  # for some stores the library says nothing of what was refused
                raise RuntimeError("the store sent nothing")
            return
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


def _downloader(origin: str) -> Any:
    """The library's download function for this address: one client a thread and kind of store."""
    module = _download_module()
    scheme = "dbfs-uc" if origin.startswith("dbfs:/Volumes") else origin.split(":")[0]
    known = sorted(filter(None, module.DOWNLOADER_MAPPINGS))
    if scheme not in known:
        raise UserError(f"{origin}: unknown kind of store {scheme!r}; known are {', '.join(known)}, or give a path")
    clients = _clients.__dict__
    if scheme not in clients:
        try:
            clients[scheme] = module.DOWNLOADER_MAPPINGS[scheme]()
            if scheme == "s3":
                _bound(clients[scheme])
        except ImportError as error:
            raise UserError(f"{origin}: {scheme} needs a package that is missing ({error}); install it") from error
    return clients[scheme].download


def _bound(downloader: Any) -> None:
    """Let an S3 client give up soon: the library leaves it a minute for each of several attempts to connect."""

    def create(unsigned: bool = False, timeout: float = TIMEOUT_S) -> None:
        from boto3.session import Session
        from botocore import UNSIGNED
        from botocore.config import Config

        patience = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": timeout}
        config = Config(**patience, retries={"total_max_attempts": 1})
        if unsigned:
            config = config.merge(Config(signature_version=UNSIGNED))
        downloader._s3_client = Session().client("s3", config=config, endpoint_url=os.environ.get("S3_ENDPOINT_URL"))

    downloader._create_s3_client = create


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
