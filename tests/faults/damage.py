"""Ways to damage checkpoints and disks, for the fault tests and for benchmarks/soak.py."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mythos.checkpoint.manifest import optimizer_file, weights_file
from mythos.run.directory import LATEST_FILE, MANIFEST_FILE, STATE_FILE, RunDirectory


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped byte in a weights file": lambda newest: flip(newest / weights_file(1)),
    "a flipped byte in an optimizer file": lambda newest: flip(newest / optimizer_file(0)),
    "a flipped byte in the manifest": lambda newest: flip(newest / MANIFEST_FILE),
    "a flipped byte in the state": lambda newest: flip(newest / STATE_FILE),
    "a truncated file": lambda newest: os.truncate(newest / weights_file(0), 1000),
    "a missing file of a rank": lambda newest: (newest / optimizer_file(1)).unlink(),
    "a pointer to a missing directory": lambda newest: shutil.rmtree(newest),
    "a truncated pointer": lambda newest: (newest.parent / LATEST_FILE).write_text("step_00", encoding="utf-8"),
}


def mount(*arguments: str, inside: Sequence[str] = ()) -> None:
    """Mount something; ``inside`` are the words of a command that enters another mount namespace.

    Raises:
        OSError: it is not allowed here.
    """
    done = subprocess.run([*inside, "mount", *arguments], capture_output=True, encoding="utf-8")
    if done.returncode:
        raise OSError(f"mount is not allowed here: {done.stderr.strip()}")


def unmount(directory: Path, inside: Sequence[str] = ()) -> None:
    subprocess.run([*inside, "umount", "--lazy", str(directory)], check=True)


@contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[None]:
    """A disk of that size, mounted on a new directory. Raises OSError."""
    directory.mkdir()
    mount("-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(directory))
    try:
        yield
    finally:
        unmount(directory)


def full_disk(run: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    ballast = run.parent / "ballast"

    def break_it() -> None:
        with ballast.open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(b"x" * 4096)
                except OSError:
                    return

    return break_it, ballast.unlink


def read_only(run: Path, inside: Sequence[str] = ()) -> tuple[Callable[[], None], Callable[[], None]]:
    directory = RunDirectory(run).checkpoints

    def break_it() -> None:
        mount("--bind", str(directory), str(directory), inside=inside)
        mount("-o", "remount,bind,ro", str(directory), inside=inside)

    return break_it, lambda: unmount(directory, inside)


def vanished(run: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    away = run.with_name("away")
    return lambda: run.rename(away), lambda: away.rename(run) and None
