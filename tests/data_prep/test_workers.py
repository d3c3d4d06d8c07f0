"""Workers as processes and as ranks, and what happens when one fails or dies: all end in seconds, with one line."""

import contextlib
import itertools
import json
import multiprocessing
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.parts import HashSource
from data_prep.workers import WorkerLost, Workers, serve
from mythos.errors import UserError
from mythos.network.messages import Listener
from mythos.network.ports import PortServer, find_port
from mythos.ranks import token
from mythos.ranks.world import World
from tests.cluster import clean_environment

LIMIT_S = 150
MYTHOS = [sys.executable, "-m", "launch.cli", "data"]


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world() -> World:
    """Rank 0 of two; it starts no local process, so that rank 1 does all the work."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return World("mpich", 0, 2, 0, 2, "127.0.0.1", probe.getsockname()[1], "secret")


def rank_1_of(world: World) -> World:
    return replace(world, rank=1, local_rank=1)


def start_rank_1(world: World) -> subprocess.Popen[str]:
    code = (
        "import sys; from data_prep.workers import serve; from mythos.ranks.world import World; "
        f"sys.exit(serve(World('mpich', 1, 2, 1, 2, '127.0.0.1', {world.port}, {world.token!r}, {world.spare_ports})))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], env=clean_environment(), stderr=subprocess.PIPE, encoding="utf-8"
    )


def hash_all(workers: Workers, paths: list[Path]) -> list[object]:
    results = dict(workers.run([HashSource(str(path)) for path in paths], lambda done_bytes: None))
    return [results[number] for number in range(len(paths))]


def test_rank_1_does_the_work_and_strangers_get_none(world: World, several_sources: list[Path]):
    hello = json.dumps({"token": "guess", "rank": 1, "host": "elsewhere", "process": 1}).encode()
    contents = [b"", b"\x00\x00", b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 1}\n', b"[" * 200_000]
    contents += [struct.pack(">I", len(text)) + text for text in (b'{"rank": 1}', hello)]
    with Workers(world, processes=0) as workers, contextlib.ExitStack() as cleanup:
        strangers = []
        service = find_port(world.address, world.ports, world.secret("secret"))
        for content, port in itertools.product(contents, (world.port, service)):
            strangers.append(cleanup.enter_context(socket.create_connection((world.address, port))))
            strangers[-1].sendall(content)
        rank_1 = start_rank_1(world)
        sizes = [size for size, _ in hash_all(workers, several_sources)]  # type: ignore[misc]
        for stranger in strangers:
            stranger.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                assert stranger.recv(1) == b"", "rank 0 sent data to an unknown process"
    assert sizes == [path.stat().st_size for path in several_sources]
    assert rank_1.wait(LIMIT_S) == 0


def test_ranks_that_share_no_secret_find_it_in_a_file(
    world: World, several_sources: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    world = replace(world, token=None)
    token.publish_token(world, "left by a killed job")
    rank_1 = start_rank_1(world)
    time.sleep(1)  # rank 1 finds the old file, too
    with Workers(world, processes=0) as workers:
        assert len(hash_all(workers, several_sources)) == len(several_sources)
    assert rank_1.wait(LIMIT_S) == 0
    assert not token.token_file(world).exists()


def test_a_rank_without_the_secret_is_refused(
    world: World, several_sources: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data_prep.workers.MEET_TIMEOUT_S", 1.0)
    with Workers(world, processes=0) as workers:
        rank_1 = start_rank_1(world)
        refused: list[str] = []

        def serve_with_a_guess() -> None:
            try:
                serve(replace(rank_1_of(world), token="guess"))
            except WorkerLost as error:
                refused.append(str(error))

        stranger = threading.Thread(target=serve_with_a_guess)
        stranger.start()
        while stranger.is_alive():
            assert len(hash_all(workers, several_sources)) == len(several_sources)
    assert "it refuses this process" in refused[0]
    assert rank_1.wait(LIMIT_S) == 0


def test_an_error_on_rank_1_is_reported_by_rank_0_and_ends_both(
    world: World, several_sources: list[Path], tmp_path: Path
):
    rank_1 = start_rank_1(world)
    gone = tmp_path / "gone.parquet"
    with pytest.raises(UserError, match=rf"{gone}: No such file"), Workers(world, processes=0) as workers:
        hash_all(workers, [*several_sources, gone])
    assert rank_1.wait(LIMIT_S) == 2
    assert rank_1.communicate()[1] == ""


def test_ctrl_c_is_left_to_the_parent_from_the_first_moment(world: World):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    others = set(multiprocessing.active_children())
    with Workers(replace(world, world_size=1), processes=2):
        own = set(multiprocessing.active_children()) - others
        assert len(own) == 2
        for child in own:
            status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
            (blocked,) = re.findall(r"^SigBlk:\s*(\w+)", status, re.MULTILINE)
            assert int(blocked, 16) >> (signal.SIGINT - 1) & 1, "also while it imports its modules"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_a_dead_rank_1_ends_rank_0(world: World, several_sources: list[Path]):
    rank_1 = start_rank_1(world)
    with Workers(world, processes=0) as workers:
        hash_all(workers, several_sources)
        rank_1.kill()
        rank_1.wait()
        with pytest.raises(WorkerLost, match=rf"rank 1 on {socket.gethostname()} \(process {rank_1.pid}\) died"):
            hash_all(workers, several_sources)


def test_a_dead_rank_0_ends_rank_1(world: World):
    with (
        Listener("secret", 1) as listener,
        PortServer(world.ports, world.secret(listener.token), listener.port),
    ):
        rank_1 = start_rank_1(world)
        peers = listener.accept(LIMIT_S)
        while not peers:
            peers = listener.accept(LIMIT_S)
        peers[0].channel.close()
        assert rank_1.wait(LIMIT_S) == 1
    assert "rank 0 died" in rank_1.communicate()[1]


def test_a_port_that_is_taken(world: World, several_sources: list[Path]):
    """By services that accept connections and say nothing."""
    world = replace(world, spare_ports=(world.port + 1, world.port + 2))
    with contextlib.ExitStack() as cleanup:
        for port in world.ports[:2]:
            with contextlib.suppress(OSError):  # it is in use already
                cleanup.enter_context(socket.create_server(("", port)))
        rank_1 = start_rank_1(world)
        with Workers(world, processes=0) as workers:
            assert len(hash_all(workers, several_sources)) == len(several_sources)
    assert rank_1.wait(LIMIT_S) == 0


def test_a_rank_0_that_never_responds(world: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data_prep.workers.MEET_TIMEOUT_S", 0.5)
    with pytest.raises(WorkerLost, match=rf"rank 0 does not respond at 127\.0\.0\.1:{world.port}"):
        serve(rank_1_of(world))
