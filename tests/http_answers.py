"""An HTTP server on loopback that answers what a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[str, str, Mapping[str, str], bytes], tuple[int, Mapping[str, str], bytes] | None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a test may let one hang

    def handle_error(self, *_: object) -> None:
        pass


@contextmanager
def answering(answer: Answer) -> Iterator[str]:
    """Yield the address of a server that asks `answer(method, target, headers, body)`, with headers in lower case.

    Its answer is the status, headers and a body; None closes the connection without one.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            answered = answer(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
            if answered is not None:
                status, headers, content = answered
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)
            self.close_connection = True

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
