"""A local server that misbehaves on demand."""

from __future__ import annotations

import contextlib
import http.server
import threading
from collections.abc import Iterator

import numpy as np

CONTENT = bytes(np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8))
MODIFIED = "Mon, 02 Jan 2023 03:04:05 GMT"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at /file and `other` at /other; the attributes say what goes wrong."""

    content = CONTENT
    other = b"something else"
    cut_after: int | None = None
    cuts_left = 0
    ranges = True
    wrong_range = False
    length = True
    etag: str | None = '"one"'
    modified: str | None = None
    failures_left = 0
    raw: bytes | None = None
    """The whole answer, if it is not an answer of HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, str | None]] = []

    def url(self, path: str = "/file") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    @property
    def starts(self) -> list[int]:
        """The first byte each request asked for."""
        return [0 if r is None else int(r.removeprefix("bytes=").rstrip("-")) for _, r in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        wanted = self.headers.get("Range")
        path = self.path.split("?")[0]
        server.requests.append((self.path, wanted))
        if server.raw is not None and path == "/file":
            self.wfile.write(server.raw)
            self.close_connection = True
            return
        if path in ("/moved", "/circle"):
            self.send_response(302)
            self.send_header("Location", "/file" if path == "/moved" else "/circle")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path == "/gone":
            self.send_error(404)
            return
        if server.failures_left:
            server.failures_left -= 1
            self.send_error(503)
            return
        body = server.other if path == "/other" else server.content
        start = self._start(body, wanted)
        if start is None:
            return
        if server.length:
            self.send_header("Content-Length", str(len(body) - start))
        for name, value in (("ETag", server.etag), ("Last-Modified", server.modified)):
            if value:
                self.send_header(name, value)
        self.end_headers()
        if server.cut_after is not None and server.cuts_left:
            server.cuts_left -= 1
            body = body[: start + server.cut_after]
        self.wfile.write(body[start:])
        self.close_connection = True

    def _start(self, body: bytes, wanted: str | None) -> int | None:
        """Send the status line; where the body begins, None if there is nothing more to send."""
        server = self.server
        if not (wanted and server.ranges and self.headers.get("If-Range") in (server.etag, server.modified)):
            self.send_response(200)
            return 0
        start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if server.wrong_range:
            start = 0
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        return start


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
