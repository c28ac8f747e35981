"""Create the project's environments, keep them equal to their lock files, and run scripts in the main one."""

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
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from cogpress.errors import CogpressError
from cogpress.setup import libraries, uv
from cogpress.setup.interpreter import check_platform, dotted, find_interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]

CHECK = "import torch, transformers, peft, bitsandbytes, vllm, cog"


class Purpose(NamedTuple):
    """What an environment is for; its dictionaries have an entry for each kind, `cpu` and `gpu`."""

    folder: str
    guard: str
    """The file in `.cache` that a set-up holds locked."""
    locks: dict[str, tuple[str, ...]]
    """Lock files in requirements/."""
    check: str
    """Python code that must run once everything is installed."""
    libraries: dict[str, tuple[str, ...]]
    """Shared libraries that the packages need from the system, checked before anything is downloaded."""
    free_gb: dict[str, int]
    """Disk needed for a new one."""
    compiled: bool = False
    """Whether the packages' modules are compiled with the installation. Where Python may not keep what it compiles
    (PYTHONDONTWRITEBYTECODE), each start of vLLM would compile 5,000 of them in both its processes, for 15 s."""


MAIN = Purpose(
    folder=".venv",
    guard="setup.lock",
    locks={"cpu": ("cpu.lock",), "gpu": ("gpu.lock", "gpu-dev.lock")},
    check=CHECK,
    libraries={"cpu": ("libnuma.so.1", "libstdc++.so.6"), "gpu": ("libstdc++.so.6",)},
    free_gb={"cpu": 6, "gpu": 25},  # the CPU environment is 4.1 GB
    compiled=True,
)
"""What every script runs in."""

QUANTIZE = Purpose(
    folder=".venv-quantize",
    guard="setup-quantize.lock",
    locks={"cpu": ("quantize.lock",), "gpu": ("quantize-gpu.lock",)},
    check="import torch, transformers, llmcompressor",
    libraries={"cpu": ("libstdc++.so.6",), "gpu": ("libstdc++.so.6",)},
    free_gb={"cpu": 3, "gpu": 15},
)
"""llmcompressor's: it needs an older transformers than vLLM does, and a newer compressed-tensors."""

INSTALLER = "installer.lock"
"""The lock of uv: pip installs it into each environment, and it installs the rest."""

STATE = "cogpress.json"
_ENTERED = "COGPRESS_ENTERED"


def enter() -> None:
    """Continue the running script in the project's environment, creating or updating it first if needed.

    Every script begins with it. Returns within milliseconds if there is nothing to do: in the environment while it
    matches the lock files, and in an interpreter that has the packages itself, such as a Cog image's. Otherwise it
    replaces the process with the same command in `.venv`. Exits with a message on a user's mistake.
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
    """Create `.venv`, or bring it up to date with the lock files.

    Args:
        gpu: install the image's CUDA builds, or CPU builds; None keeps the kind that is there, CPU at first.

    Raises:
        CogpressError: this machine cannot run it, or the installation failed; says what to do.
    """
    Environment(ROOT).setup(gpu)


def _put_first_on_path(folder: Path) -> None:
    """vLLM looks up programs there: it compiles kernels with the environment's ninja."""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if folders[0] != str(folder):
        os.environ["PATH"] = os.pathsep.join([str(folder), *folders])


def _continue_in(environment: Environment) -> NoReturn:
    # A process keeps its id across exec: if the mark has it, exec did not lead into .venv.
    if os.environ.get(_ENTERED) == str(os.getpid()):
        raise CogpressError(
            f"{environment.python} does not run in {environment.venv}. Delete that folder, then run again."
        )
    os.environ[_ENTERED] = str(os.getpid())
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(str(environment.python), [str(environment.python), *sys.argv])


def say(text: str) -> None:
    """Print progress to standard error: standard output is the script's own."""
    print(text, file=sys.stderr, flush=True)


class StepFailed(CogpressError):
    """A program of the set-up failed; keeps what it printed."""

    def __init__(self, step: str, output: list[str]) -> None:
        super().__init__(uv.explain(step, output))
        self.output = "\n".join(output)


class Environment:
    """An environment of the repository at `root`.

    A state file in it (`cogpress.json`) says what it holds. The file is written first, marked incomplete, so that an
    interrupted set-up is noticed and restarted, and a `.venv` without one is never touched.
    """

    def __init__(self, root: Path, purpose: Purpose = MAIN) -> None:
        self.root = root
        self.purpose = purpose
        self.venv = root / purpose.folder
        self.python = self.venv / "bin" / "python"
        self._guard: int | None = None

    def locks(self, kind: str) -> list[Path]:
        """The lock files of the `cpu` or the `gpu` environment."""
        return [self.root / "requirements" / name for name in self.purpose.locks[kind]]

    def torch_version(self) -> str:
        """The version of torch that requirements/base.in pins."""
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
        """The content of the state file; None if the environment was not created here."""
        try:
            state = json.loads((self.venv / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return state if isinstance(state, dict) else None

    def ready(self, kind: str | None = None) -> bool:
        """Whether it is complete, matches the lock files and is of this kind."""
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
            raise CogpressError("Interrupted; the next command restarts the set-up.") from None
        except PermissionError as error:
            raise CogpressError(f"Cannot write {error.filename}. Make {self.root} writable.") from None

    def _setup(self, gpu: bool | None) -> None:
        state = self.state()
        kind = (state or {}).get("kind", "cpu") if gpu is None else ("gpu" if gpu else "cpu")
        if self.ready(kind):
            say(f"{self.venv} is up to date.")
            return
        started = time.monotonic()
        reason = why_anew(state, kind, self.venv, self.python)
        libraries.check(libraries.absent(self.purpose.libraries[kind]))
        if state is not None and reason is None:
            self._update(state, kind)
        else:
            say(str(reason))
            self._make(kind)
        for site_packages in self.venv.glob("lib/python*/site-packages"):
            libraries.check(libraries.needed(site_packages))
        self._run([str(self.python), "-c", self.purpose.check], "the check that it imports")
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
        except StepFailed as error:
            if re.search(uv.FETCHING, error.output):  # nothing has changed: the next update can start from here
                self._mark(state)
            raise

    def _install(self, kind: str) -> None:
        """Make the environment equal to its locks; torch's CPU build, which is in none, is added to those for CPUs."""
        pip = [str(self.python), "-m", "pip", "--no-input", "--disable-pip-version-check"]
        installer = str(self.root / "requirements" / INSTALLER)
        options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:", "-r", installer]
        self._run([*pip, "install", *options], "the installation of uv")
        configured = uv.settings(self._run([*pip, "config", "list"], "pip's configuration"))
        locks = [str(path) for path in self.locks(kind)]
        if kind == "cpu":
            torch = self.venv / "torch.txt"
            torch.write_text(f"torch=={self.torch_version()}+cpu\n", encoding="utf-8")
            locks.insert(0, str(torch))
        command = [*uv.sync(str(self.python), locks, configured), *["--compile-bytecode"] * self.purpose.compiled]
        variables, step = uv.variables(configured), f"the packages of {' and '.join(self.purpose.locks[kind])}"
        try:
            self._run(command, step, variables)
        except StepFailed as error:
            if kind != "cpu" or not re.search(uv.TORCH_MISSING, error.output):
                raise
            say("  torch's CPU build is not in the configured package index: trying PyTorch's own")
            self._run([*command, "--find-links", uv.PYTORCH_CPU], step, variables)

    def _mark(self, state: dict[str, str]) -> None:
        """Write the state file atomically."""
        draft = self.venv / (STATE + ".new")
        draft.write_text(json.dumps(state), encoding="utf-8")
        draft.replace(self.venv / STATE)

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Let one set-up run at a time: a second one waits, then finds the work done."""
        import fcntl  # not on Windows, where check_platform has refused by now

        guard = self.root / ".cache" / self.purpose.guard
        guard.parent.mkdir(exist_ok=True)
        with open(guard, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"Another command is setting up {self.venv}: waiting for it.")
                fcntl.flock(file, fcntl.LOCK_EX)
            self._guard = file.fileno()
            yield

    def _run(self, command: Sequence[str], step: str, variables: Mapping[str, str] | None = None) -> str:
        """Run one program, showing uv's progress as it comes; return what it printed.

        Raises:
            StepFailed: it failed; says why and what to do.
        """
        process = subprocess.Popen(
            command,
            cwd=str(self.root),
            env={**(variables or {}), **clean_environment(os.environ)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            # It holds the lock too: if this process is killed while uv goes on, the next command waits.
            pass_fds=() if self._guard is None else (self._guard,),
        )
        lines: list[str] = []
        assert process.stdout is not None
        try:
            for line in process.stdout:
                lines.append(line.rstrip())
                if re.match(uv.PROGRESS, line):
                    say("  " + uv.without_credentials(lines[-1]))
            process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
        if process.returncode:
            raise StepFailed(step, lines)
        return "\n".join(lines)


def clean_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Drop the settings that would make Python, pip or uv work elsewhere or on other packages."""
    unwanted = {"PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
    unwanted |= {"UV_CONSTRAINT", "UV_EXCLUDE_NEWER", "UV_NO_VERIFY_HASHES", "UV_REQUIRE_HASHES", "UV_TORCH_BACKEND"}
    kept = {name: value for name, value in variables.items() if name not in unwanted}
    # Set, not dropped: it may also come from a pip.conf, which variables override.
    return {**kept, "PIP_USER": "0", "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1", "NO_COLOR": "1"}


def check_disk(free_bytes: int, needed_gb: int, place: Path) -> None:
    """Fail before the download rather than during it.

    Raises:
        CogpressError: the disk has less room than the environment needs.
    """
    if free_bytes < needed_gb * 1e9:
        raise CogpressError(
            f"The environment needs {needed_gb} GB at {place}, where {free_bytes / 1e9:.1f} GB are free. Make room."
        )


def why_anew(state: dict[str, str] | None, kind: str, venv: Path, python: Path) -> str | None:
    """Why an environment must be created anew, in words; None if an update will do.

    Raises:
        CogpressError: the folder exists but was not created here.
    """
    if not venv.exists():
        return f"Setting up {venv}, once; later commands start at once."
    if state is None:
        raise CogpressError(
            f"{venv} was not created by scripts/setup or scripts/quantize. Delete or rename it, then run again."
        )
    if state.get("state") != "complete":
        return f"The last set-up of {venv} was interrupted: starting again."
    if state.get("kind") != kind:
        return f"{venv} is for {state.get('kind')}: creating it again for {kind}."
    if not python.exists():
        return f"The Python that {venv} was created with is gone: creating it again."
    return None
