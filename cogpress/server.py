"""The image's own server, run from `cog.yaml` without Docker.

Knows what `cog build` would have set (the schema file, the references, the concurrency) and how to start, watch and
end the runtime with everything that it started; leaves requests to `client`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx
import psutil
import yaml

from cogpress import schema
from cogpress.errors import CogpressError

GRACE_SECONDS = 10.0
"""How long a stopping server may take to end its predictions before it is killed."""

_LOG_LINES = 12


class Server:
    """Cog's real runtime on one project, in a process of its own.

    As a context manager it starts on entry and leaves nothing running on exit.
    """

    def __init__(
        self,
        root: Path,
        *,
        weights: str | None = None,
        port: int = 0,
        host: str = "127.0.0.1",
        mode: Literal["predict", "train"] = "predict",
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Describe a server; nothing starts yet.

        Args:
            root: the folder with `cog.yaml`.
            weights: what `COG_WEIGHTS` says: a folder, a tar or a URL. None leaves it to the runner.
            port: 0 takes a free one.
            host: the address to listen on; loopback unless asked otherwise.
            mode: which endpoints to serve.
            log: file for the server's output; None prints it to the terminal.
            env: more environment variables.
        """
        self.root = root
        self.host = host
        self.mode = mode
        self.log = log
        self.port = port or _free_port(host)
        self._weights = weights
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server answers."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the runtime; returns before it is ready.

        Raises:
            CogpressError: `cog.yaml` is missing or names what is not there, or the port is taken.
        """
        settings = read_cog_yaml(self.root)
        run, train = settings.get("run"), settings.get("train")
        reference = train if self.mode == "train" else run
        if not reference:
            wanted = "train" if self.mode == "train" else "run"
            raise CogpressError(f"{self.root / 'cog.yaml'} has no `{wanted}:`, so there is nothing to serve. Add it.")
        _check_free(self.host, self.port)
        schema.write(self.root, run, train)
        environment = {
            **os.environ,
            **_environment(settings),
            "COG_PREDICT_TYPE_STUB": run or "",
            "COG_TRAIN_TYPE_STUB": train or "",
            "COG_MAX_CONCURRENCY": str(schema.concurrency(self.root, run) if run and self.mode == "predict" else 1),
            "PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
            **self._env,
        }
        environment.pop("COG_WEIGHTS", None)
        if self._weights is not None:
            environment["COG_WEIGHTS"] = self._weights
        command = [sys.executable, "-m", "cog.server.http", "--host", self.host]
        if self.mode == "train":
            command += ["--x-mode", "train"]
        output = None
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self.log.open("wb")
        try:
            # A session of its own, so that Ctrl-C in a terminal reaches us alone and we end the server in order.
            self._process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        finally:
            if output is not None:
                output.close()

    def wait_ready(
        self, timeout: float = 1800.0, on_wait: Callable[[float], None] = lambda _seconds: None
    ) -> dict[str, Any]:
        """Wait until the runner's `setup()` is done; returns the last health answer.

        Args:
            timeout: seconds.
            on_wait: called about twice a second with the seconds waited.

        Raises:
            CogpressError: setup failed, the server ended, or time is up; quotes the end of the log.
        """
        started = time.monotonic()
        while (waited := time.monotonic() - started) < timeout:
            if self._process is None or self._process.poll() is not None:
                raise CogpressError(f"The server ended before it was ready.{self._log_end()}")
            try:
                health: dict[str, Any] = httpx.get(f"{self.url}/health-check", timeout=5).json()
            except (httpx.HTTPError, ValueError):
                health = {}
            # The endpoint always answers 200; only its status tells.
            if health.get("status") in ("READY", "BUSY"):
                return health
            if health.get("status") in ("SETUP_FAILED", "DEFUNCT"):
                logs = (health.get("setup") or {}).get("logs") or ""
                raise CogpressError(f"The runner's setup failed.{_last_lines(logs) or self._log_end()}")
            on_wait(waited)
            time.sleep(0.25)
        raise CogpressError(f"The server was not ready after {timeout:.0f} s.{self._log_end()}")

    def wait(self) -> int:
        """Wait until the server ends by itself; returns its exit status."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """End the server and every process that it started, first kindly."""
        if self._process is None:
            return
        # The engine runs in grandchildren, which would outlive a killed parent, so they are noted while it lives.
        family = _family(self._process.pid)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        _, alive = psutil.wait_procs(family, timeout=2)
        for process in alive:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(alive, timeout=5)
        self._process.wait()
        self._process = None

    def _log_end(self) -> str:
        if self.log is None or not self.log.is_file():
            return " Its output above tells why."
        return _last_lines(self.log.read_text(errors="replace")) + f"\nThe whole log is in {self.log}."


def _family(pid: int) -> list[psutil.Process]:
    """A process, its descendants, and everything else in its session."""
    found: dict[int, psutil.Process] = {}
    try:
        leader = psutil.Process(pid)
        for process in [leader, *leader.children(recursive=True)]:
            found[process.pid] = process
    except psutil.NoSuchProcess:
        pass
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == pid:
                found[process.pid] = process
        except (ProcessLookupError, PermissionError):
            continue
    return list(found.values())


def _last_lines(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return "".join(f"\n    {line[:300]}" for line in lines[-_LOG_LINES:])


def read_cog_yaml(root: Path) -> dict[str, Any]:
    """The project's `cog.yaml`.

    Raises:
        CogpressError: it is missing or no YAML mapping.
    """
    path = root / "cog.yaml"
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CogpressError(f"{path} does not exist. Run this in a cogpress project.") from None
    except yaml.YAMLError as error:
        raise CogpressError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise CogpressError(f"{path} must be a mapping with `run:` and `build:`.")
    return settings


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    pairs = (str(item).partition("=") for item in settings.get("environment") or [])
    return {name: value for name, _, value in pairs}


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _check_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CogpressError(f"Port {port} on {host} can not be used: {error.strerror}. Choose another.") from None
