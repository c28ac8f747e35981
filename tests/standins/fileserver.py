"""A web server for tests, with ranges, validators and the faults of real servers."""

from __future__ import annotations

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FileServer:
    """Serves a folder on loopback. Attributes change its behavior; `log` has the requests.

    Attributes:
        ranges, etags: whether the server has them.
        cuts: connections still to cut, each after `cut_after` bytes of a file's body.
        stalls: connections still to fall silent there, without an end.
        busy: requests still to answer with 503.
        chunked: whether responses omit the size.
        delay: seconds before each block of 64 kB.
        hold: bodies of more than a block wait until it is set, for a minute at most.
        redirects: `{path: URL}`.
        headers: added to each response.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.log: list[tuple[str, str, str | None]] = []
        self.ranges = self.etags = True
        self.cuts = self.busy = self.stalls = 0
        self.cut_after = 0
        self.chunked = False
        self.delay = 0.0
        self.hold: threading.Event | None = None
        self.redirects: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.lock = threading.Lock()

    def asked(self, path: str) -> list[str | None]:
        """The requested ranges of a path, without the first byte alone, which clients request to look at a file."""
        return [wanted for _, asked, wanted in self.log if asked == path and wanted != "bytes=0-0"]

    def take(self, name: str) -> bool:
        with self.lock:
            left = getattr(self, name)
            setattr(self, name, max(0, left - 1))
            return left > 0


@contextmanager
def serve(folder: Path) -> Iterator[FileServer]:
    """Run a server in threads of this process."""
    state = FileServer(folder)
    handler = type("Handler", (_Handler,), {"state": state})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    # Clients that are killed are no fault of the server's.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FileServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        state = self.state
        path, _, query = self.path.partition("?")
        if self.command == "GET":
            with state.lock:
                state.log.append((query, path, self.headers.get("Range")))
        if path in state.redirects:
            self.answer(302, {"Location": state.redirects[path]})
            return
        if state.take("busy"):
            self.answer(503)
            return
        file = state.folder / path.lstrip("/")
        if not file.is_file():
            self.answer(404)
            return
        body = file.read_bytes()
        headers = dict(state.headers)
        if state.etags:
            headers["ETag"] = f'"{file.stat().st_mtime_ns}-{len(body)}"'
        status, start, whole = 200, 0, len(body)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if state.ranges and wanted and self.headers.get("If-Range", headers.get("ETag")) == headers.get("ETag"):
            start, end = int(wanted[1]), int(wanted[2])
            if start >= whole:
                self.answer(416, {"Content-Range": f"bytes */{whole}"})
                return
            body, status = body[start : end + 1], 206
            headers["Content-Range"] = f"bytes {start}-{start + len(body) - 1}/{whole}"
        self.send_response(status)
        if state.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        looking = self.headers.get("Range") == "bytes=0-0"
        self.send(body, cut=not looking and state.take("cuts"), stall=not looking and state.take("stalls"))

    def send(self, body: bytes, cut: bool, stall: bool) -> None:
        state = self.state
        if state.hold and len(body) > 65536:
            state.hold.wait(60)
        try:
            for at in range(0, len(body), 65536):
                if cut and at >= state.cut_after:
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return
                if stall and at >= state.cut_after:
                    self.wfile.flush()
                    self.connection.recv(1)  # until the client gives up
                    self.close_connection = True
                    return
                if state.delay:
                    time.sleep(state.delay)
                block = body[at : at + 65536]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block) if state.chunked else block)
            if state.chunked:
                self.wfile.write(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()
