"""JSON messages between the processes of a job over TCP, for the watchdog and for `mythos data`. No torch.

    frame      4 bytes, big-endian: the length of what follows; then a JSON object in UTF-8
    handshake  the process that connects sends {"token", "rank", "host", "process"}; the listener answers {"welcome"}

Any process that can reach the host can connect to the port. A connection that does not send the job's token within
HELLO_TIMEOUT_S, or sends anything else, is closed. Until then nothing waits for it, and at most HELLO_BYTES of it are
kept. The processes of a job trust each other, and nothing is encrypted: a cluster's network is private.
"""

import hmac
import ipaddress
import json
import os
import select
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

MESSAGE_BYTES = 256 << 20
HELLO_BYTES = 4096
HELLO_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10.0
UNKNOWN_CONNECTIONS = 256
"""Connections that have not sent the token: how many are kept open at a time, the oldest being closed first."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 20_000}
"""A node that loses power or network closes no connection: it counts as closed after about 20 s without an answer."""
PATIENT_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
"""After about 60 s, where the other end may be busy and a short network failure may pass."""
_HEADER = struct.Struct(">I")


class Channel:
    """One end of a connection. All methods raise OSError if the other end has closed or sent an invalid message."""

    def __init__(self, connection: socket.socket, message_bytes: int = MESSAGE_BYTES) -> None:
        self.message_bytes = message_bytes
        """Longer messages are refused."""
        self._connection = connection
        self._unread = bytearray()
        self._messages: deque[dict[str, Any]] = deque()

    def fileno(self) -> int:
        """The file descriptor, for selectors."""
        return self._connection.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        content = json.dumps(message).encode()
        self._connection.sendall(_HEADER.pack(len(content)) + content)

    def receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next message, after waiting for it; TimeoutError if it is not complete within ``timeout_s``."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._messages:
            if deadline is not None and not self.readable(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"no message within {timeout_s:g} s")
            self._read()
        return self._messages.popleft()

    def receive_available(self) -> list[dict[str, Any]]:
        """The messages that are complete now, possibly none. Does not wait if the channel is readable."""
        if not self._messages:
            self._read()
        messages = list(self._messages)
        self._messages.clear()
        return messages

    def readable(self, timeout_s: float = 0.0) -> bool:
        """Whether a message, a part of one, or the end of the connection arrives within ``timeout_s``."""
        if self._messages:
            return True
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _read(self) -> None:
        received = self._connection.recv(1 << 16)
        if not received:
            raise ConnectionError("the connection was closed")
        self._unread += received
        while len(self._unread) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._unread)
            if length > self.message_bytes:
                raise ConnectionError(f"a message of {length} bytes: at most {self.message_bytes} are allowed")
            end = _HEADER.size + length
            if len(self._unread) < end:
                return
            self._messages.append(_parse(bytes(self._unread[_HEADER.size : end])))
            del self._unread[:end]


@dataclass(frozen=True)
class Peer:
    """A process of the same job at the other end of a channel."""

    channel: Channel
    rank: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.process})"


class Listener(AbstractContextManager["Listener"]):
    """Accepts connections of processes that know the token. Close it when all have arrived, or use it in ``with``.

    Args:
        peers: the number of processes that are expected.
        address: of the interface to listen at; None for all.
        keep_alive: TCP options of the connections, in seconds (TCP_USER_TIMEOUT in milliseconds).

    Raises:
        OSError: the port cannot be opened.
    """

    def __init__(
        self, token: str, peers: int, address: str | None = None, keep_alive: Mapping[str, int] = KEEP_ALIVE
    ) -> None:
        self.token, self._keep_alive = token, keep_alive
        backlog = peers + UNKNOWN_CONNECTIONS
        if address is None:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            self._server = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=backlog)
        else:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._server = socket.create_server((address, 0), family=family, backlog=backlog)
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self._unknown: dict[Channel, float] = {}
        """Connections that have not sent the token, oldest first, and until when they may."""
        self._selector = selectors.EpollSelector()
        self._selector.register(self._server, selectors.EVENT_READ)

    def fileno(self) -> int:
        """Readable when ``accept`` has something to do."""
        return self._selector.fileno()

    def accept(self, timeout_s: float = 0.0) -> list[Peer]:
        """The peers that have arrived, after waiting at most ``timeout_s`` for something to happen: often none."""
        arrived = []
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.fileobj, Channel):
                if key.fileobj in self._unknown:  # unless a new connection has just taken its place
                    arrived += self._introduce(key.fileobj)
            else:
                self._take_connection()
        now = time.monotonic()
        for channel, until in list(self._unknown.items()):
            if now > until:
                self._drop(channel)
        return arrived

    def close(self) -> None:
        """Accept no more connections."""
        for channel in list(self._unknown):
            self._drop(channel)
        self._selector.close()
        self._server.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take_connection(self) -> None:
        if len(self._unknown) >= UNKNOWN_CONNECTIONS:
            self._drop(next(iter(self._unknown)))
        try:
            connection, _ = self._server.accept()
        except OSError:  # it was closed in the meantime
            return
        connection.setblocking(True)
        _set_keep_alive(connection, self._keep_alive)
        channel = Channel(connection, HELLO_BYTES)
        self._unknown[channel] = time.monotonic() + HELLO_TIMEOUT_S
        self._selector.register(channel, selectors.EVENT_READ)

    def _introduce(self, channel: Channel) -> list[Peer]:
        """The peer whose token has arrived; none if it is not complete yet, or if the connection had to be dropped."""
        try:
            messages = channel.receive_available()
            if not messages:
                return []
            peer = self._peer(channel, messages[0])
            channel.send({"welcome": True})
        except (OSError, ValueError):
            self._drop(channel)
            return []
        self._forget(channel)
        channel.message_bytes = MESSAGE_BYTES
        return [peer]

    def _peer(self, channel: Channel, hello: dict[str, Any]) -> Peer:
        token, rank, host, process = (hello.get(name) for name in ("token", "rank", "host", "process"))
        if not (isinstance(token, str) and hmac.compare_digest(token.encode(), self.token.encode())):
            raise ValueError("not the token of this job")
        if not (isinstance(rank, int) and isinstance(host, str) and isinstance(process, int)):
            raise ValueError("not an introduction")
        return Peer(channel, rank, host, process)

    def _drop(self, channel: Channel) -> None:
        self._forget(channel)
        channel.close()

    def _forget(self, channel: Channel) -> None:
        del self._unknown[channel]
        self._selector.unregister(channel)


def interface(name: str, one_host: bool) -> str | None:
    """The address of this host to which ``name`` resolves, to listen only there; None for all interfaces.

    All interfaces are needed where the name means the loopback interface here but other hosts connect, which is how
    some distributions write their own name into /etc/hosts, and where the address is not one of this host (NAT).
    """
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError:
        return None
    return None if ipaddress.ip_address(address.partition("%")[0]).is_loopback and not one_host else address


def connect(
    address: str,
    port: int,
    token: str,
    rank: int,
    timeout_s: float | None,
    keep_alive: Mapping[str, int] = KEEP_ALIVE,
) -> Channel:
    """Connect to a listener and wait until it has accepted the token.

    Args:
        timeout_s: for the connection, and again for the answer; None waits for the answer as long as the listener's
            process is alive, which may be busy.
        keep_alive: TCP options of the connection, as for ``Listener``.

    Raises:
        OSError: the listener cannot be reached, does not answer in time, or refuses the token.
    """
    connection = socket.create_connection((address, port), timeout=timeout_s or CONNECT_TIMEOUT_S)
    connection.settimeout(None)
    _set_keep_alive(connection, keep_alive)
    channel = Channel(connection)
    try:
        channel.send({"token": token, "rank": rank, "host": socket.gethostname(), "process": os.getpid()})
        channel.receive(timeout_s)
    except TimeoutError:
        channel.close()
        raise
    except OSError as error:
        channel.close()
        raise ConnectionError(f"it refuses this process or has ended ({error})") from error
    return channel


def _parse(content: bytes) -> dict[str, Any]:
    try:
        message = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConnectionError(f"not a JSON message: {error}") from error
    if not isinstance(message, dict):
        raise ConnectionError("not a JSON object")
    return message


def _set_keep_alive(connection: socket.socket, keep_alive: Mapping[str, int]) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in keep_alive.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
