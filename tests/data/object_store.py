"""A local S3 server: the part of the protocol that a download needs, serving a directory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def object_store(directory: Path) -> Iterator[str]:
    """Serve ``directory`` as the content of every bucket; yields the address of the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = directory / self.path.split("?")[0].lstrip("/").split("/", 1)[1]
            if not path.is_file():
                body = b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>"
                self.send_response(404)
            else:
                body = path.read_bytes()
                if "Range" in self.headers:
                    start, end = self.headers["Range"].removeprefix("bytes=").split("-")
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{end or len(body) - 1}/{len(body)}")
                    body = body[int(start) : int(end) + 1 if end else None]
                else:
                    self.send_response(200)
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
                self.send_header("ETag", f'"{len(body)}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
