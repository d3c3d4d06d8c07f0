"""Messages between the processes of a job, and connections of other processes, over real sockets."""

import contextlib
import json
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mythos.errors import UserError
from mythos.network import messages
from mythos.network.messages import HELLO_BYTES, Channel, Listener, Peer, connect, interface
from mythos.ranks import token
from mythos.ranks.world import World

LIMIT_S = 20.0


def frame(content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + content


STRANGERS = {
    "says nothing": b"",
    "two bytes, then nothing": b"\x00\x00",
    "a header, then nothing": struct.pack(">I", 100),
    "a line of JSON": b'{"rank": 1}\n',
    "no token": frame(b'{"rank": 1}'),
    "another token": frame(json.dumps({"token": "guess", "rank": 1, "host": "a", "process": 1}).encode()),
    "a token that is not text": frame(json.dumps({"token": 1, "rank": 1, "host": "a", "process": 1}).encode()),
    "a token that is not UTF-8": frame(b'{"token": "\\ud800", "rank": 1, "host": "a", "process": 1}'),
    "no rank": frame(b'{"token": "secret"}'),
    "no object": frame(b"[1, 2]"),
    "no JSON": frame(b"\xff\xfe"),
    "an empty frame": frame(b""),
    "200,000 brackets": b"[" * 200_000,
    "as many brackets as a hello may have": frame(b"[" * HELLO_BYTES),
    "a frame that is too long": struct.pack(">I", HELLO_BYTES + 1),
    "a request for a web page": b"GET / HTTP/1.1\r\n\r\n",
}


def connect_stranger(port: int, content: bytes) -> socket.socket:
    stranger = socket.create_connection(("127.0.0.1", port))
    with contextlib.suppress(OSError):  # the listener may have closed the connection meanwhile
        stranger.sendall(content)
    return stranger


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


def accept_until(listener: Listener, condition: Callable[[list[Peer]], bool]) -> list[Peer]:
    peers: list[Peer] = []
    until = time.monotonic() + LIMIT_S
    while not condition(peers):
        assert time.monotonic() < until, "condition not met in time"
        peers += listener.accept(0.05)
    return peers


def connect_in_thread(port: int, found: list[Channel], secret: str = "secret") -> threading.Thread:
    thread = threading.Thread(target=lambda: found.append(connect("127.0.0.1", port, secret, 3, LIMIT_S)))
    thread.start()
    return thread


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_delays_nobody_and_is_not_accepted(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "HELLO_TIMEOUT_S", 0.3)
    found: list[Channel] = []
    with Listener("secret", 1) as listener:
        with connect_stranger(listener.port, STRANGERS[what]) as stranger:
            listener.accept(1.0)
            start = time.monotonic()
            thread = connect_in_thread(listener.port, found)
            peers = accept_until(listener, bool)
            assert time.monotonic() - start < 5
            assert [peer.rank for peer in peers] == [3]
            assert accept_until(listener, lambda _: is_closed(stranger)) == []
        thread.join()
    assert str(peers[0]) == f"rank 3 on {socket.gethostname()} (process {peers[0].process})"
    peers[0].channel.close()
    found[0].close()


def test_an_endless_line_and_a_slow_one_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "HELLO_TIMEOUT_S", 0.5)
    ended = threading.Event()

    def send_for_ever(port: int, content: bytes, pause_s: float) -> None:
        with socket.create_connection(("127.0.0.1", port)) as stranger, contextlib.suppress(OSError):
            while not ended.is_set():
                stranger.sendall(content)
                time.sleep(pause_s)

    with Listener("secret", 1) as listener:
        strangers = [
            threading.Thread(target=send_for_ever, args=(listener.port, content, pause_s))
            for content, pause_s in ((b"x" * 65536, 0.0), (b"\x00", 0.1))
        ]
        for stranger in strangers:
            stranger.start()
        try:
            accept_until(listener, lambda _: not any(stranger.is_alive() for stranger in strangers))
        finally:
            ended.set()


def test_many_idle_connections_do_not_keep_a_rank_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Channel] = []
    with Listener("secret", 1) as listener, contextlib.ExitStack() as cleanup:
        monkeypatch.setattr(messages, "UNKNOWN_CONNECTIONS", 5)
        strangers = [cleanup.enter_context(connect_stranger(listener.port, b"")) for _ in range(20)]
        thread = connect_in_thread(listener.port, found)
        peers = accept_until(listener, bool)
        thread.join()
        assert sum(is_closed(stranger) for stranger in strangers) >= 15
        for channel in (peers[0].channel, found[0]):
            channel.close()


def test_a_refused_or_unanswered_connection_is_an_error() -> None:
    with Listener("secret", 1) as listener:
        refused: list[BaseException] = []

        def try_other_token() -> None:
            try:
                connect("127.0.0.1", listener.port, "other", 1, LIMIT_S)
            except OSError as error:
                refused.append(error)

        thread = threading.Thread(target=try_other_token)
        thread.start()
        assert accept_until(listener, lambda _: not thread.is_alive()) == []
        with pytest.raises(TimeoutError):
            connect("127.0.0.1", listener.port, "secret", 1, 0.2)  # accept is never called
    assert isinstance(refused[0], ConnectionError)
    assert "refuses this process" in str(refused[0])


@pytest.fixture
def channels() -> tuple[Channel, Channel, socket.socket]:
    """Two ends, and the socket below the second one."""
    first, second = socket.socketpair()
    return Channel(first), Channel(second, 1 << 20), second


def test_messages_arrive_completely_and_in_order(channels: tuple[Channel, Channel, socket.socket]) -> None:
    first, second, _ = channels
    assert not second.readable()
    for number in range(3):
        first.send({"number": number, "text": "ä" * 1000})
    assert second.receive(LIMIT_S)["number"] == 0
    assert second.readable()
    assert [message["number"] for message in second.receive_available()] == [1, 2]
    large = {"numbers": list(range(100_000))}
    thread = threading.Thread(target=first.send, args=(large,))
    thread.start()
    assert second.receive(LIMIT_S) == large
    thread.join()


def test_a_part_of_a_message_does_not_block(channels: tuple[Channel, Channel, socket.socket]) -> None:
    first, _, raw = channels
    raw.sendall(frame(b'{"a": 1}')[:-1])
    assert first.receive_available() == []
    with pytest.raises(TimeoutError):
        first.receive(0.05)
    raw.sendall(b"}" + frame(b'{"b": 2}'))
    assert first.receive_available() == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("content", [b"", frame(b"nothing"), frame(b"3"), frame(b"[" * 100_000), b"\xff" * 4])
def test_the_end_and_invalid_messages_are_os_errors(
    content: bytes, channels: tuple[Channel, Channel, socket.socket]
) -> None:
    first, second, raw = channels
    thread = threading.Thread(target=raw.sendall if content else second.close, args=(content,) if content else ())
    thread.start()
    with pytest.raises(ConnectionError):
        first.receive(LIMIT_S)
    thread.join()


# ---- the secret


def test_the_token_file_can_be_read_by_this_user_alone_and_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    world = World("srun", 0, 2, 0, 1, "node1", 20017)
    with pytest.raises(FileNotFoundError):
        token.read_token(world)
    token.publish_token(world, "left by a killed job")
    secret = token.new_token(world)
    token.publish_token(world, secret)
    assert token.read_token(world) == secret
    assert len(secret) >= 32
    assert stat.S_IMODE(token.token_file(world).stat().st_mode) == 0o600
    token.remove_token(world)
    assert not token.token_file(world).exists()
    token.remove_token(world)


def test_a_token_that_the_ranks_share_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    world = World("mpich", 0, 2, 0, 2, "127.0.0.1", 20017, "shared")
    assert token.new_token(world) == "shared"
    token.publish_token(world, "shared")
    assert token.read_token(world) == "shared"
    token.remove_token(world)
    assert list(tmp_path.iterdir()) == []
    assert "shared" not in repr(world)


def test_a_home_directory_that_cannot_be_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set MYTHOS_JOB_TOKEN"):
        token.publish_token(World("srun", 0, 2, 0, 1, "node1", 20017), "secret")


def test_a_connection_that_makes_room_for_a_new_one_in_the_same_moment_does_not_end_the_listener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(messages, "UNKNOWN_CONNECTIONS", 1)
    with Listener("secret", 1) as listener:
        for _ in range(20):
            first = connect_stranger(listener.port, b"")
            accept_until(listener, lambda _: bool(listener._unknown))
            # Both are ready when accept looks again: the new connection, and the first one's message.
            second = connect_stranger(listener.port, b"")
            first.sendall(b"\x00\x00")
            time.sleep(0.01)
            listener.accept(0.05)
            assert len(listener._unknown) == 1
            first.close()
            second.close()
            accept_until(listener, lambda _: not listener._unknown)
        found: list[Channel] = []
        thread = connect_in_thread(listener.port, found)
        assert accept_until(listener, lambda peers: bool(peers))[0].rank == 3
        thread.join()


@pytest.mark.parametrize(
    ("name", "one_host", "expected"),
    [
        ("127.0.0.1", True, "127.0.0.1"),
        ("localhost", False, None),
        ("192.0.2.1", True, None),
        ("no-such-host.invalid", True, None),
    ],
)
def test_a_listener_uses_only_the_interface_of_its_job(name: str, one_host: bool, expected: str | None) -> None:
    address = interface(name, one_host)
    assert address == expected
    with Listener("token", 1, address) as listener:
        other_interface = ("127.0.0.2", listener.port)
        if address is None:
            socket.create_connection(other_interface).close()
        else:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(other_interface)
