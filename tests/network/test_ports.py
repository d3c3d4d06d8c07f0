"""The ranks find each other although another service is at the port that they expect."""

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from mythos.errors import UserError
from mythos.network import ports
from mythos.network.ports import PortServer, find_port
from mythos.ranks import group
from mythos.ranks.world import World

HERE = "127.0.0.1"


@pytest.fixture
def free_ports() -> tuple[int, ...]:
    """Three consecutive ports that are free now."""
    while True:
        with socket.create_server((HERE, 0)) as first, contextlib.suppress(OSError):
            port: int = first.getsockname()[1]
            for spare in (port + 1, port + 2):
                socket.create_server((HERE, spare)).close()
            return (port, port + 1, port + 2)


@contextlib.contextmanager
def web_server(port: int) -> Iterator[list[bytes]]:
    """Another service, and what it was sent."""
    received: list[bytes] = []
    server = socket.create_server((HERE, port))

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = server.accept()
                with connection:
                    received.append(connection.recv(1000))
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    yield received
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def test_the_next_free_port_is_found_and_no_other_service_learns_the_secret(free_ports: tuple[int, ...]) -> None:
    with web_server(free_ports[0]) as received, PortServer(free_ports, "secret", 4321) as server:
        assert server.port == free_ports[1]
        assert find_port(HERE, free_ports, "secret") == 4321
        with pytest.raises(OSError, match="it refuses this process, has ended, or is another service"):
            find_port(HERE, free_ports, "guess")
    assert received
    assert not any(b"secret" in text for text in received)
    with pytest.raises(OSError, match="refused"):
        find_port(HERE, free_ports, "secret")


def test_another_job_at_the_same_port_is_not_taken_for_this_one(free_ports: tuple[int, ...]) -> None:
    with PortServer(free_ports, "other", 1), PortServer(free_ports, "own", 2):
        assert find_port(HERE, free_ports, "own") == 2
        assert find_port(HERE, free_ports, "other") == 1


def test_a_service_that_says_nothing_is_passed_over(
    free_ports: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "ANSWER_TIMEOUT_S", 0.2)
    with socket.create_server((HERE, free_ports[0])), PortServer(free_ports, "secret", 4321):
        assert find_port(HERE, free_ports, "secret") == 4321


@pytest.mark.parametrize("question", [b"\n", b"nonce guess\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 5000])
def test_who_does_not_know_the_secret_gets_no_answer(question: bytes, free_ports: tuple[int, ...]) -> None:
    with PortServer(free_ports, "secret", 4321), socket.create_connection((HERE, free_ports[0]), 60) as stranger:
        stranger.sendall(question)
        with contextlib.suppress(ConnectionError):
            assert stranger.recv(1) == b""


def test_no_free_port_is_reported_in_one_line(free_ports: tuple[int, ...]) -> None:
    with contextlib.ExitStack() as services:
        for port in free_ports:
            services.enter_context(socket.create_server((HERE, port)))
        with pytest.raises(
            UserError, match=rf"^MASTER_PORT = {free_ports[0]}-{free_ports[2]}: cannot be opened .*in use"
        ):
            PortServer(free_ports, "secret", 4321)


def test_three_ranks_meet_at_the_next_free_port(free_ports: tuple[int, ...]) -> None:
    worlds = [World("srun", rank, 3, rank, 3, HERE, free_ports[0], None, free_ports[1:]) for rank in range(3)]
    stores: dict[int, dist.TCPStore] = {}
    with web_server(free_ports[0]):
        threads = [threading.Thread(target=lambda w=world: stores.update({w.rank: group._meet(w)})) for world in worlds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len({store.port for store in stores.values()}) == 1
    stores[2].set("hello", "from rank 2")
    assert stores[1].get("hello") == b"from rank 2"
