"""A process that was killed while it compiled must not stop later starts."""

import fcntl
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import clear_caches

from mythos.engine.compiled_code import remove_unfinished
from tests.require import require


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache; the precompiled headers stay where they are, since they take half a minute."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


def double(x: Tensor) -> Tensor:
    return 2 * x.sin()


def compiled(x: Tensor) -> Tensor:
    """As a new process would compute it, but for libraries that this one has loaded."""
    torch._dynamo.reset()
    clear_caches()
    return torch.compile(double, fullgraph=True)(x)


def test_a_library_that_is_cut_off_is_removed_and_compiled_again(cache: Path) -> None:
    require("g++")
    x = torch.arange(40.0)
    torch.testing.assert_close(compiled(x), double(x))
    assert not list(remove_unfinished())
    (library,) = cache.glob("*/*.main.so")
    content = library.read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 0):
        library.unlink(missing_ok=True)  # this process has loaded the file: it must not change
        library.write_bytes(content[:kept])
        assert list(remove_unfinished()) == [library]
    torch.testing.assert_close(compiled(x), double(x))
    assert library.read_bytes() == content


def test_what_was_being_compiled_is_removed_unless_it_still_is(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(cache))
    monkeypatch.setattr("tempfile.tempdir", None)  # known from TMPDIR as it was
    libraries, headers = cache / "ab", cache / "torchinductor_x" / "precompiled_headers"
    monkeypatch.setattr("getpass.getuser", lambda: "x")
    for folder in (libraries, headers, cache / "locks"):
        folder.mkdir(parents=True)
    library, header = libraries / "key.main.so", headers / "key.h.gch"
    for file in (library, header):
        file.write_bytes(b"unfinished")
        file.with_name(f"{file.stem}_CxxBuild").mkdir()  # torch's own name
    with (cache / "locks" / "key.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert list(remove_unfinished()) == [header]
    assert list(remove_unfinished()) == [library]
    assert not any(path.name.startswith("key.") for folder in (libraries, headers) for path in folder.iterdir())
