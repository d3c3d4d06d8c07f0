"""How the ranks find the port that rank 0 has opened, although another service may use the one they expect. No torch.

Rank 0 opens the first free port of a list that all ranks know, and answers there at which port its own service is. The
others ask at each port of the list in turn, until one gives the right answer. Each side proves that it knows the job's
secret, and sends neither it nor anything that reveals it: there may be another service at the port, or another job.

    question  NONCE HMAC(secret, NONCE)               a line of text; NONCE is chosen at random
    answer    PORT HMAC(secret, "NONCE PORT")         a line; anybody else gets no answer
"""

import contextlib
import hashlib
import hmac
import secrets
import socket
import socketserver
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager

from mythos.errors import UserError

ANSWER_TIMEOUT_S = 5.0
LINE_BYTES = 256


class PortServer(AbstractContextManager["PortServer"]):
    """Answers in a thread of its own, inside a ``with`` block, at which port rank 0's service is.

    Args:
        ports: the ports to try, in order.
        secret: what only the ranks of this job know.
        answer: the port of the service.

    Raises:
        UserError: none of the ports is free.
    """

    def __init__(self, ports: Sequence[int], secret: str, answer: int) -> None:
        self._server = _open_first(ports, secret, answer)
        self.port: int = self._server.server_address[1]
        """The port of the list that was free."""
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="port server", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def __exit__(self, *_: object) -> None:
        self.close()


def find_port(address: str, ports: Sequence[int], secret: str) -> int:
    """The port of rank 0's service, after one question at each port of the list. Raises OSError if none answers."""
    failures: dict[str, None] = {}
    for port in ports:
        try:
            return _ask(address, port, secret)
        except OSError as error:
            failures[str(error)] = None
    raise ConnectionError("; ".join(failures))


def describe(ports: Sequence[int]) -> str:
    """The list as a text: 20017, or 20017-20036."""
    return f"{ports[0]}-{ports[-1]}" if len(ports) > 1 else str(ports[0])


class _Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    allow_reuse_address = True  # a port whose last connections are still being closed is free
    request_queue_size = 4096
    daemon_threads = True
    block_on_close = False

    def __init__(self, port: int, secret: str, answer: int) -> None:
        self.secret, self.answer = secret, answer
        super().__init__(("", port), _Handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Handler(socketserver.StreamRequestHandler):
    timeout = ANSWER_TIMEOUT_S
    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # it does not write, or has gone
            nonce, _, proof = self.rfile.readline(LINE_BYTES).decode("latin-1").strip().partition(" ")
            if _proves(proof, self.server.secret, nonce):
                reply = f"{self.server.answer} {_proof(self.server.secret, f'{nonce} {self.server.answer}')}\n"
                self.wfile.write(reply.encode())


def _open_first(ports: Sequence[int], secret: str, answer: int) -> _Server:
    for port in ports:
        try:
            return _Server(port, secret, answer)
        except OSError as error:
            reason = error.strerror
    raise UserError(
        f"MASTER_PORT = {describe(ports)}: cannot be opened on this host ({reason}): set MASTER_PORT to a free port, "
        "the same for all ranks"
    )


def _ask(address: str, port: int, secret: str) -> int:
    nonce = secrets.token_hex(16)
    with socket.create_connection((address, port), timeout=ANSWER_TIMEOUT_S) as connection:
        connection.sendall(f"{nonce} {_proof(secret, nonce)}\n".encode())
        with connection.makefile("rb") as stream:
            answer, _, proof = stream.readline(LINE_BYTES).decode("latin-1").strip().partition(" ")
    if not _proves(proof, secret, f"{nonce} {answer}"):
        raise ConnectionError("it refuses this process, has ended, or is another service")
    return int(answer)


def _proof(secret: str, text: str) -> str:
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def _proves(proof: str, secret: str, text: str) -> bool:
    return hmac.compare_digest(proof.encode(), _proof(secret, text).encode())
