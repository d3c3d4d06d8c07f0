"""Atomic writes and flushes, with the errors of a full disk and of file systems that cannot flush directories."""

import errno
import os
import stat
from pathlib import Path

import pytest

from mythos import files
from mythos.files import flush_directory, opened_atomically


def refuse(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every fsync fail with this error."""

    def fsync(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "_warned_of", [])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF])
def test_a_directory_that_cannot_be_flushed_is_a_warning_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(number, monkeypatch)
    for name in "ab":
        (tmp_path / name).mkdir()
        flush_directory(tmp_path / name)
    (message,) = caplog.messages
    assert message.startswith(
        f"{tmp_path / 'a'}: this file system does not flush directories ({os.strerror(number)}): "
    )


def test_other_errors_of_a_directory_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        flush_directory(tmp_path / "missing")
    for number in (errno.EIO, errno.ENOSPC, errno.ESTALE):
        refuse(number, monkeypatch)
        with pytest.raises(OSError, match=os.strerror(number)):
            flush_directory(tmp_path)


def test_a_full_disk_does_not_hide_the_first_error(tmp_path: Path) -> None:
    """/dev/full accepts what is buffered, and fails when the file is closed."""
    (tmp_path / ".x").symlink_to("/dev/full")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "temporary_path", lambda path: tmp_path / ".x")
        with pytest.raises(ValueError, match="the cause"), opened_atomically(tmp_path / "x") as file:  # noqa: PT012
            file.write(b"content")
            raise ValueError("the cause")
        assert not list(tmp_path.iterdir())


def test_a_directory_that_vanished_does_not_hide_the_first_error(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    with pytest.raises(ValueError, match="the cause"), opened_atomically(directory / "x"):  # noqa: PT012
        directory.rename(tmp_path / "moved")
        directory.write_text("a file in its place", encoding="utf-8")
        raise ValueError("the cause")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o027, 0o077])
def test_a_file_gets_the_mode_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        files.write_atomically(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o666 & ~umask
