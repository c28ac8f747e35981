"""Replicate's API with given answers: it refuses and fails as the real one may, and takes one token."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "r8_not-a-real-token"

Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]]


class Stub:
    """Answers each route with its replies in turn, the last one again and again."""

    def __init__(self, replies: dict[str, list[Reply]]) -> None:
        self.asked: list[str] = []
        self.bodies: list[Any] = []
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                route = f"{self.command} {self.path}"
                stub.bodies.append(json.loads(self.rfile.read(length) or b"null"))
                stub.asked.append(route)
                assert self.headers["authorization"] == f"Bearer {TOKEN}"
                left = replies.get(route, [(404, {"detail": "Not found"})])
                status, body, *headers = left.pop(0) if len(left) > 1 else left[0]
                content = json.dumps(body).encode()
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def count(self, route: str) -> int:
        return self.asked.count(route)


@contextmanager
def replicate(replies: dict[str, list[Reply]]) -> Iterator[Stub]:
    stub = Stub(replies)
    threading.Thread(target=stub.server.serve_forever, args=(0.02,), daemon=True).start()
    yield stub
    stub.server.shutdown()
