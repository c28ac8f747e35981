"""The image's own server without Docker: start, watch and stop Cog's runtime with what `cog build` would have set."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml

from cogpress.cog import client, ending, schema
from cogpress.config import parse_yaml
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json

GPU_IMAGE, CPU_IMAGE = "cog.yaml", "cog.cpu.yaml"
"""The files that describe the images of a project: the usual one, and the one for machines without a GPU."""

GRACE_SECONDS = 10.0
"""For a stopping server to end its predictions before it is killed."""

ALONE_SECONDS = 15.0
"""How long a starting runtime may lack a worker process; it normally starts one at once."""

FAMILY_SECONDS = 2.0
"""For the engine's processes to end once the server has, and again after SIGTERM, before they are killed."""

LOOK_SECONDS, DEAD_LOOKS = 5.0, 2
"""Seconds between health checks, and the number of consecutive failures after which a server counts as dead."""

RESTART_SECONDS = 60.0
"""A server that stops working sooner after its start is not started again."""

_LOG_LINES = 12


class Server:
    """Cog's real runtime on one project, in its own process.

    A context manager: it starts on entry and stops on exit, also when this process ends for any reason but SIGKILL.
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
            weights: the value of `COG_WEIGHTS`: a folder, a tar or a URL; None leaves it to the runner.
            port: 0 takes a free one.
            host: the address to listen on.
            mode: which endpoints to serve.
            log: a file for the server's output; None prints to the terminal.
            env: more environment variables, which win.

        Raises:
            CogpressError: the weights do not exist.
        """
        self.root = root.resolve()
        self.host = host
        self.mode = mode
        self.log = log
        self.port = port or free_port(host)
        self._weights = _weights(weights)
        self._env = dict(env or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where the server answers."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The server's process, which leads its own session; None before the start."""
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        """Whether the server's process is running."""
        return self._process is not None and self._process.poll() is None

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start the runtime; returns before it is ready.

        Raises:
            CogpressError: `cog.yaml` is missing or names something missing, or the port is taken.
        """
        settings = read_cog_yaml(self.root)
        run, train = settings.get("run"), settings.get("train")
        wanted = "train" if self.mode == "train" else "run"
        if not settings.get(wanted):
            raise CogpressError(f"{self.root / 'cog.yaml'} has no `{wanted}:`. Add it.")
        check_free(self.host, self.port)
        schema.write(self.root, run, train)
        command = [sys.executable, "-m", "cog.server.http", "--host", self.host]
        if self.mode == "train":
            command += ["--x-mode", "train"]
        output = None
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            output = self.log.open("wb")
        try:
            # Its own session: Ctrl-C in a terminal reaches this process alone, which stops the server in order.
            self._process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self._variables(settings, run, train),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        finally:
            if output is not None:
                output.close()
        atexit.register(self.stop)

    def _variables(self, settings: dict[str, Any], run: str | None, train: str | None) -> dict[str, str]:
        concurrency = schema.concurrency(self.root, run) if run else 1  # the image's, in both modes
        variables = {
            **os.environ,
            **_environment(settings),
            "COG_PREDICT_TYPE_STUB": run or "",
            "COG_TRAIN_TYPE_STUB": train or "",
            "COG_MAX_CONCURRENCY": str(concurrency),
            "PORT": str(self.port),
            # The runtime starts its worker as `python`, which must be the one with cog installed.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.root), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            ending.WATCHED: "1",
            "LOG_FORMAT": "console",
        }
        if self.log is not None:
            variables["NO_COLOR"] = "1"
        variables.pop("COG_WEIGHTS", None)
        if self._weights is not None:
            variables["COG_WEIGHTS"] = self._weights
        return variables | self._env

    def wait_ready(self, timeout: float = 1800.0) -> dict[str, Any]:
        """Wait, at most `timeout` seconds, until the runner's `setup()` is done; returns the last health report.

        Raises:
            CogpressError: setup failed, the server exited, or time is up; quotes the end of the log.
        """
        started = alone_since = time.monotonic()
        while time.monotonic() - started < timeout:
            self._check_alive(" before it was ready")
            health = client.health(self.url) or {}
            # The endpoint always answers 200; only `status` tells.
            status = health.get("status")
            if status in ("READY", "BUSY"):
                return health
            if status in client.DEAD:
                raise CogpressError(f"The runner's setup failed: {_reason(health)}{self._log_end()}")
            # The runtime waits forever for a worker that could not even start.
            if status != "STARTING" or self._has_worker():
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > ALONE_SECONDS:
                raise CogpressError(f"The server's worker process exited before its setup began.{self._log_end()}")
            time.sleep(0.25)
        raise CogpressError(f"The server was not ready after {timeout:.0f} s.{self._log_end()}")

    def wait(self) -> None:
        """Wait while the server works.

        Raises:
            CogpressError: it exited, or its worker or its engine did; quotes the end of the log.
        """
        dead, looked = 0, time.monotonic()
        while True:
            self._check_alive()
            if time.monotonic() - looked >= LOOK_SECONDS:
                report, looked = client.health(self.url) or {}, time.monotonic()
                dead = dead + 1 if report.get("status") in client.DEAD else 0
                if dead >= DEAD_LOOKS:
                    raise CogpressError(f"The server has stopped working ({report['status']}).{self._log_end()}")
            time.sleep(0.5)

    def serve(self, on_ready: Callable[[], None], on_restart: Callable[[str], None]) -> None:
        """Start, and start again whenever the server stops working after it had worked for a while.

        Args:
            on_ready: called when it is ready, after each start.
            on_restart: called with the reason before it starts again.

        Raises:
            CogpressError: it does not get ready, or stops working soon after.
        """
        while True:
            self.start()
            self.wait_ready()
            on_ready()
            ready = time.monotonic()
            try:
                self.wait()
            except CogpressError as error:
                if time.monotonic() - ready < RESTART_SECONDS:
                    raise
                on_restart(str(error))
            self.stop()

    def stop(self) -> None:
        """Stop the server and every process that it started, with SIGTERM first; twice does no harm."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        end_family(process)

    def _check_alive(self, before: str = "") -> None:
        if self._process is None:
            raise CogpressError("The server is not running. Start it first.")
        status = self._process.poll()
        if status is not None:
            how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
            raise CogpressError(f"The server exited{before}, {how}.{self._log_end()}")

    def _has_worker(self) -> bool:
        try:
            children = psutil.Process(self._process.pid).children() if self._process else []
            return any(child.status() != psutil.STATUS_ZOMBIE for child in children)
        except psutil.NoSuchProcess:
            return False

    def _log_end(self) -> str:
        if self.log is None or not self.log.is_file():
            return "\nSee its output above."
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        end = "".join(f"\n    {line[:300]}" for line in lines[-_LOG_LINES:])
        return f"\nThe log ends:{end}\nAll of it is in {self.log}."


def end_family(leader: subprocess.Popen[Any], grace: float | None = None) -> None:
    """Stop a process that leads a session, and everything that it started, with SIGTERM first.

    Args:
        leader: the process, started with `start_new_session=True`.
        grace: seconds before it is killed; None takes `GRACE_SECONDS`.
    """
    # An engine runs in grandchildren, which outlive the leader: list them while it lives.
    family = _family(leader.pid)
    try:
        leader.send_signal(signal.SIGTERM)
        leader.wait(GRACE_SECONDS if grace is None else grace)
        _, left = psutil.wait_procs(family, timeout=FAMILY_SECONDS)
        told = [process for process in left if _signal(process, signal.SIGTERM)]
        psutil.wait_procs(told, timeout=FAMILY_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    finally:
        # Also when a second Ctrl-C interrupts the wait.
        killed = [process for process in family | _family(leader.pid) if _signal(process, signal.SIGKILL)]
        leader.kill()
        leader.wait()
        psutil.wait_procs(killed, timeout=FAMILY_SECONDS)


def note(path: Path, servers: Iterable[Server]) -> None:
    """Note the processes of servers in a file, for the `end_noted` of the next run if this one is killed."""
    found = []
    for server in servers:
        with contextlib.suppress(psutil.Error):
            if server.pid is not None:
                found.append({"pid": server.pid, "created": psutil.Process(server.pid).create_time()})
    write_json(path, found)


def end_noted(path: Path) -> None:
    """Stop the servers that a killed run noted, and remove the note."""
    try:
        noted = read_json(path)
    except (OSError, ValueError):
        return
    for one in noted:
        with contextlib.suppress(psutil.Error, KeyError, TypeError):
            leader = psutil.Process(one["pid"])
            if leader.create_time() == one["created"]:  # and not another process that got its number
                end_session(leader)
    path.unlink(missing_ok=True)


def end_session(leader: psutil.Process) -> None:
    """Stop what a killed run left: a process that leads a session, and everything that it started."""
    family = {leader, *_family(leader.pid)}
    told = [process for process in family if _signal(process, signal.SIGTERM)]
    _, left = psutil.wait_procs(told, timeout=GRACE_SECONDS)
    psutil.wait_procs([process for process in left if _signal(process, signal.SIGKILL)], timeout=FAMILY_SECONDS)


def _family(pid: int) -> set[psutil.Process]:
    """A process's descendants and everything else in the session that it leads, without the process itself."""
    found: set[psutil.Process] = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        found.update(psutil.Process(pid).children(recursive=True))
    for process in psutil.process_iter():
        try:
            if process.pid != pid and os.getsid(process.pid) == pid:
                found.add(process)
        except (ProcessLookupError, PermissionError):
            continue
    return found


def _signal(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal to a process; False where it is gone already."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return False
    return True


def _reason(health: dict[str, Any]) -> str:
    """The runner's error without the runtime's prefixes."""
    if health.get("user_healthcheck_error"):
        return str(health["user_healthcheck_error"])
    logs = str((health.get("setup") or {}).get("logs") or "").strip()
    return logs.rpartition("setup failed: ")[2].removeprefix("CogpressError: ") or "it gave no reason."


def _weights(given: str | None) -> str | None:
    """The value of `COG_WEIGHTS`: a URL, or a path that is also valid in the server's working directory."""
    if given is None or "://" in given:
        return given
    path = Path(given).expanduser().resolve()
    if not path.exists():
        raise CogpressError(f"There are no weights at {path}. Make them with scripts/train, or name others.")
    return str(path)


class _Loader(yaml.SafeLoader):
    """As Cog reads YAML: 3.10 without quotes stays the text 3.10."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in listed if tag != "tag:yaml.org,2002:float"]
    for first, listed in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_cog_yaml(text: str) -> Any:
    """The first document of a cog.yaml, as Cog reads it.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return parse_yaml(_Loader(text).get_data)


def read_cog_yaml(root: Path, name: str = GPU_IMAGE) -> dict[str, Any]:
    """The project's `cog.yaml`, or that of its image for CPUs.

    Raises:
        CogpressError: it is missing or not a YAML mapping.
    """
    path = root / name
    try:
        settings = parse_cog_yaml(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CogpressError(f"{path} does not exist. Run this in a cogpress project.") from None
    except OSError as error:
        raise CogpressError(f"{path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CogpressError(f"{path} is not YAML: {' '.join(str(error).split())}. Correct that line.") from None
    if not isinstance(settings, dict):
        raise CogpressError(f"{path} must be a mapping with `run:` and `build:`.")
    return settings


def _environment(settings: dict[str, Any]) -> dict[str, str]:
    pairs = (str(item).partition("=") for item in settings.get("environment") or [])
    return {name: value for name, _, value in pairs}


def free_port(host: str) -> int:
    """A free port below the kernel's ephemeral range, from which outgoing connections get theirs.

    The server binds it seconds later, and no connection may have taken it by then.

    Raises:
        CogpressError: none of a hundred ports is free.
    """
    below, why = _ephemeral_start(), None
    for _ in range(100):
        port = secrets.randbelow(below - 10_000) + 10_000
        try:
            with socket.socket() as probe:
                probe.bind((host, port))
        except OSError as error:
            why = error.strerror
        else:
            return port
    raise CogpressError(f"No port between 10000 and {below} can be used on {host}: {why}. End what you no longer need.")


def _ephemeral_start() -> int:
    """The start of the kernel's ephemeral ports; 32768, Linux's default, where that is unknown."""
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 32_768
    return lowest if lowest > 10_100 else 65_536


def check_free(host: str, port: int) -> None:
    """Check that a port is free.

    Raises:
        CogpressError: it is not.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise CogpressError(
                f"Port {port} on {host} cannot be used: {error.strerror}. Stop what uses it, or choose another."
            ) from None
