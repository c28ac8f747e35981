"""The project's own environments: made, kept equal to the lock files, and the main one entered by every script.

Knows the lock files, and leaves to them what is installed; which Python can run it is `interpreter`'s, what
pip is told and what it means `pip`'s. It runs before anything is there, so all of them are standard library
only, and in a syntax that Python 3.8 reads: it must be able to say that a Python is too old.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cogpress.errors import CogpressError
from cogpress.setup import pip
from cogpress.setup.interpreter import check_platform, dotted, find_interpreter
from cogpress.setup.progress import Progress, say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]

CHECK = "import torch, transformers, peft, trl, bitsandbytes, vllm, cog"


class Purpose(NamedTuple):
    """What an environment is for: its folder, what is installed by kind of machine, and whether each step is told."""

    folder: str
    log: str
    locks: dict[str, tuple[str, ...]]
    """The lock files of the `cpu` and the `gpu` environment, in the order they are installed."""
    check: str
    """Python code that runs where everything is there."""
    free_gb: dict[str, int]
    """Disk needed for a new one: what is installed and pip's downloads on the way."""
    tells_steps: bool


MAIN = Purpose(
    folder=".venv",
    log="setup.log",
    locks={"cpu": ("cpu.lock",), "gpu": ("gpu.lock", "gpu-dev.lock")},
    check=CHECK,
    free_gb={"cpu": 6, "gpu": 25},  # 3.7 GB without a GPU are installed
    tells_steps=True,
)
"""What every script runs in."""

QUANTIZE = Purpose(
    folder=".venv-quantize",
    log="setup-quantize.log",
    locks={"cpu": ("quantize.lock",), "gpu": ("quantize-gpu.lock",)},
    check="import torch, transformers, llmcompressor",
    free_gb={"cpu": 3, "gpu": 15},
    tells_steps=False,
)
"""llmcompressor's own, because it needs an older transformers than vLLM's and a newer compressed-tensors."""

STATE = "cogpress.json"
_ENTERED = "COGPRESS_ENTERED"


def enter() -> None:
    """Continue the running script in the project's environment, made or updated first where needed.

    The first lines of every script. Returns within milliseconds where there is nothing to do: in the environment
    while it agrees with the lock files, and in an interpreter that has the packages by itself, such as a Cog image's.
    Otherwise replaces the process by the same command in `.venv`. A user's mistake ends it with its text.
    """
    environment = Environment(ROOT)
    try:
        if Path(sys.prefix).resolve() == environment.venv.resolve():
            if environment.ready():
                _put_first_on_path(environment.python.parent)
                return
        elif all(importlib.util.find_spec(name) for name in ("vllm", "peft", "cog")):
            return
        if not environment.ready():
            environment.setup()
        _continue_in(environment)
    except CogpressError as error:
        sys.exit(str(error))


def setup(gpu: bool | None = None) -> None:
    """Make `.venv` or bring it up to date with the lock files.

    Args:
        gpu: install the CUDA builds that the image has, or the CPU ones; None keeps what is there, CPU at first.

    Raises:
        CogpressError: this machine, its Python or pip can not do it; the text says what to do.
    """
    Environment(ROOT).setup(gpu)


def _put_first_on_path(folder: Path) -> None:
    """For what looks its programs up there: vLLM compiles kernels with the environment's ninja."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if folders[0] != str(folder):
        os.environ["PATH"] = os.pathsep.join([str(folder), *folders])


def _continue_in(environment: Environment) -> NoReturn:
    # The process keeps its id across exec, so a mark with this id means that exec did not lead into .venv.
    if os.environ.get(_ENTERED) == str(os.getpid()):
        raise CogpressError(f"{environment.python} does not run in {environment.venv}. Delete that folder, run again.")
    os.environ[_ENTERED] = str(os.getpid())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(str(environment.python), [str(environment.python), *sys.argv])


class Environment:
    """An environment of the repository at `root`.

    A file in it (`cogpress.json`) says what it holds. It is there from the first moment on, marked incomplete, so that
    an interrupted set-up is noticed and started again, and a `.venv` that someone else made is never touched.
    """

    def __init__(self, root: Path, purpose: Purpose = MAIN) -> None:
        self.root = root
        self.purpose = purpose
        self.venv = root / purpose.folder
        self.python = self.venv / "bin" / "python"
        self.log = root / ".cache" / purpose.log
        self._lock_file: int | None = None

    def locks(self, kind: str) -> list[Path]:
        """The lock files of the `cpu` or the `gpu` environment, in the order they are installed."""
        return [self.root / "requirements" / name for name in self.purpose.locks[kind]]

    def torch_version(self) -> str:
        """The version of torch that requirements/base.in names."""
        path = self.root / "requirements" / "base.in"
        match = re.search(r"^torch==(\S+)", path.read_text(encoding="utf-8"), re.M)
        if match is None:
            raise CogpressError(f"{path} does not pin torch: it needs a line like torch==2.13.0.")
        return match.group(1)

    def digest(self, kind: str) -> str:
        """A hash of everything that decides what is installed."""
        content = hashlib.sha256(self.torch_version().encode())
        for path in self.locks(kind):
            content.update(path.read_bytes())
        return content.hexdigest()

    def state(self) -> dict[str, str] | None:
        """What the environment says of itself; None where it was not made here."""
        try:
            state = json.loads((self.venv / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) else None

    def ready(self, kind: str | None = None) -> bool:
        """Whether it is complete, as the lock files say, and of the kind asked for."""
        state = self.state() or {}
        if state.get("state") != "complete" or kind not in (None, state.get("kind")) or not self.python.exists():
            return False
        return state.get("locks") == self.digest(state["kind"])

    def setup(self, gpu: bool | None = None) -> None:
        """See `setup`."""
        check_platform(sys.platform, platform.machine(), platform.libc_ver())
        try:
            with self._exclusively():
                self._setup(gpu)
        except KeyboardInterrupt:
            raise CogpressError("Interrupted; the next command starts the set-up again.") from None
        except PermissionError as error:
            raise CogpressError(f"{error.filename} can not be written. Make {self.root} writable.") from None

    def _setup(self, gpu: bool | None) -> None:
        state = self.state()
        kind = (state or {}).get("kind", "cpu") if gpu is None else ("gpu" if gpu else "cpu")
        if self.ready(kind):
            say(f"{self.venv} is up to date.")
            return
        started = time.monotonic()
        self.log.write_text("", encoding="utf-8")
        reason = why_anew(state, kind, self.venv, self.python)
        if state is not None and reason is None:
            self._update(state, kind)
        else:
            say(str(reason))
            self._make(kind)
        self._run([str(self.python), "-c", self.purpose.check], "check that it imports")
        self._mark({"state": "complete", "kind": kind, "locks": self.digest(kind)})
        say(f"{self.venv} is ready ({time.monotonic() - started:.0f} s).")

    def _make(self, kind: str) -> None:
        interpreter, version = find_interpreter()
        if self.venv.exists():
            shutil.rmtree(self.venv)
        check_disk(shutil.disk_usage(self.root).free, self.purpose.free_gb[kind], self.root)
        self.venv.mkdir()
        self._mark({"state": "incomplete", "kind": kind})
        self._run([interpreter, "-m", "venv", "--prompt", "cogpress", str(self.venv)], f"Python {dotted(version)}")
        self._install(kind)

    def _update(self, state: dict[str, str], kind: str) -> None:
        say(f"The lock files have changed: updating {self.venv}")
        self._mark({"state": "incomplete", "kind": kind})
        try:
            self._install(kind)
            self._uninstall_others(kind)
        except CogpressError:
            # Without a network, say: pip stopped before it touched anything, and the next update can start from here.
            if "Installing collected packages" not in self.log.read_text(encoding="utf-8"):
                self._mark(state)
            raise

    def _install(self, kind: str) -> None:
        if kind == "cpu":
            self._install_torch()
        for path in self.locks(kind):
            names = pip.locked_names(path.read_text(encoding="utf-8"))
            # Not compiled: a third of the time otherwise, for modules most of which are never imported.
            options = ["--no-deps", "--require-hashes", "--no-compile", "--only-binary", ":all:", "-r", str(path)]
            self._run(self._pip("install", *options), f"{len(names)} packages of {path.name}", packages=True)

    def _install_torch(self) -> None:
        version = self.torch_version()
        configured, pytorch = pip.torch_attempts(version)
        label = f"torch {version} for CPU"
        try:
            self._run(self._pip("install", *configured), label)
        except CogpressError:
            say(f"  not in the configured package index: trying {pip.PYTORCH_CPU_INDEX}")
            self._run(self._pip("install", *pytorch), label)

    def _uninstall_others(self, kind: str) -> None:
        """An update leaves what the locks no longer name: take it out, so that it equals a new one."""
        from importlib import metadata  # slow to import, and `enter` has milliseconds

        locks = [path.read_text(encoding="utf-8") for path in self.locks(kind)]
        wanted = {"pip", "torch"}.union(*map(pip.locked_names, locks))
        folders = [str(path) for path in self.venv.glob("lib/python*/site-packages")]
        others = sorted({pip.normalized(d.metadata["Name"]) for d in metadata.distributions(path=folders)} - wanted)
        if others:
            self._run(self._pip("uninstall", "--yes", *others), f"removing {', '.join(others)}")

    def _pip(self, command: str, *arguments: str) -> list[str]:
        return [str(self.python), "-m", "pip", command, "--no-input", "--disable-pip-version-check", *arguments]

    def _mark(self, state: dict[str, str]) -> None:
        """Written beside and moved into place, so that it is never half there."""
        draft = self.venv / (STATE + ".new")
        draft.write_text(json.dumps(state), encoding="utf-8")
        draft.replace(self.venv / STATE)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """One set-up at a time: a second one waits, and then finds the work done."""
        import fcntl  # not on Windows, where check_platform has refused by now

        self.log.parent.mkdir(exist_ok=True)
        with open(self.log.with_suffix(".lock"), "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Another command is setting up {self.venv}: waiting for it.")
                fcntl.flock(file, fcntl.LOCK_EX)
            self._lock_file = file.fileno()
            yield

    def _run(self, command: Sequence[str], label: str, packages: bool = False) -> None:
        """Run one step with live progress and its output in the log; explain where it fails."""
        # pip holds the lock too: if this process is killed and pip goes on, the next command waits for it.
        holding = () if self._lock_file is None else (self._lock_file,)
        process = subprocess.Popen(
            command,
            cwd=str(self.root),
            env=pip.clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            pass_fds=holding,
        )
        lines: list[str] = []
        reader = threading.Thread(target=self._read, args=(process, lines), daemon=True)
        reader.start()
        progress = Progress(label, self.purpose.tells_steps)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                progress.show(self._installed(lines) if packages else "")
        except BaseException:
            process.terminate()
            raise
        finally:
            reader.join(timeout=10)
            progress.end(process.returncode == 0)
        if process.returncode:
            raise CogpressError(pip.explain(label, lines, self.log))

    def _read(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        assert process.stdout is not None
        with open(self.log, "a", encoding="utf-8") as log:
            for line in process.stdout:
                line = pip.without_credentials(line)
                lines.append(line.rstrip())
                log.write(line)
                log.flush()

    def _installed(self, lines: list[str]) -> str:
        """How far pip is. While it installs, it prints nothing: count what has appeared on disk."""
        if any(line.startswith("Installing collected packages") for line in lines):
            return f"{len(list(self.venv.glob('lib/python*/site-packages/*.dist-info')))} installed"
        found = sum(line.startswith(("Collecting ", "Requirement already satisfied")) for line in lines)
        return f"{found} collected"


def check_disk(free_bytes: int, needed_gb: int, place: Path) -> None:
    """Fail before the download instead of in its middle.

    Raises:
        CogpressError: there is less room than an environment takes.
    """
    if free_bytes < needed_gb * 1e9:
        raise CogpressError(
            f"The environment needs {needed_gb} GB at {place}; {free_bytes / 1e9:.1f} GB are free. Make room there."
        )


def why_anew(state: dict[str, str] | None, kind: str, venv: Path, python: Path) -> str | None:
    """Why an environment must be made from nothing, in words; None where an update will do.

    Raises:
        CogpressError: there is a `.venv` that was not made here.
    """
    if not venv.exists():
        return f"Setting up {venv}, once; later commands start at once."
    if state is None:
        raise CogpressError(
            f"{venv} is there but was not made by scripts/setup or scripts/quantize. Delete it or give it another "
            "name, then run again."
        )
    if state.get("state") != "complete":
        return f"The last set-up of {venv} was interrupted: starting again."
    if state.get("kind") != kind:
        return f"{venv} is for {state.get('kind')}: making it again for {kind}."
    if not python.exists():
        return f"The Python that {venv} was made with is gone: making it again."
    return None
