"""Compiled code that a killed process has left unfinished in torch's cache on this host.

The C++ compiler writes a library or a precompiled header at its final place, and torch keeps a directory
``NAME_CxxBuild`` beside it meanwhile (``torch._inductor.cpp_builder``). Killed in between, both are left, and every
later start would fail to load the file. After a crash of the host a library can be cut off without that directory.
"""

import fcntl
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

BUILD_SUFFIX = "_CxxBuild"
SUFFIXES = (".so", ".gch")
ELF_HEADER = struct.Struct("<4s36xQ10xHH2x")
"""Of 64-bit libraries: the magic number, and offset, size and number of the section headers, which are at the end."""


def remove_unfinished() -> Iterator[Path]:
    """Remove and yield such files, which are then compiled again, but not what is being compiled at the moment."""
    cache, headers = Path(cache_dir()), Path(default_cache_dir(), "precompiled_headers")
    yield from _remove_from(headers, headers / "locks")
    for folder in cache.iterdir():
        if folder.is_dir() and folder != headers:
            yield from _remove_from(folder, cache / "locks")


def _remove_from(folder: Path, locks: Path) -> Iterator[Path]:
    names = {path.name.removesuffix(BUILD_SUFFIX) for path in folder.glob(f"*{BUILD_SUFFIX}")}
    names |= {path.stem for path in folder.glob("*.so")}
    for name in sorted(names):
        if not _is_unfinished(folder, name):
            continue
        locks.mkdir(exist_ok=True)
        with (locks / f"{name.partition('.')[0]}.lock").open("a", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # what torch holds while it compiles
            except BlockingIOError:
                continue
            if _is_unfinished(folder, name):  # still: another rank may have removed it and compiled it again
                for path in (folder / f"{name}{suffix}" for suffix in SUFFIXES):
                    if path.exists():
                        path.unlink()
                        yield path
                shutil.rmtree(folder / f"{name}{BUILD_SUFFIX}", ignore_errors=True)


def _is_unfinished(folder: Path, name: str) -> bool:
    return (folder / f"{name}{BUILD_SUFFIX}").exists() or _is_cut_off(folder / f"{name}.so")


def _is_cut_off(library: Path) -> bool:
    """Whether the section headers of an ELF library are missing; the linker writes them last."""
    try:
        with library.open("rb") as file:
            start, size = file.read(ELF_HEADER.size), library.stat().st_size
    except FileNotFoundError:  # removed by another process since
        return False
    if len(start) < ELF_HEADER.size:
        return True
    magic, offset, entry_size, entries = ELF_HEADER.unpack(start)
    return magic != b"\x7fELF" or offset + entry_size * entries > size
