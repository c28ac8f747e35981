"""The project's own environments: made, kept equal to the lock files, and the main one entered by every script.

Knows interpreters, pip and the lock files; leaves to them what is installed. It runs before anything is there, so it
is standard library only, and in a syntax that Python 3.8 reads: it must be able to say that a Python is too old.
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
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Tuple

from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent

PYTHONS = ((3, 11), (3, 12), (3, 13))
"""The Pythons that the locks are for, the one they were tested on first."""

OLDEST_GLIBC = (2, 31)
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
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

Version = Tuple[int, int]


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
            names = locked_names(path.read_text(encoding="utf-8"))
            # Not compiled: a third of the time otherwise, for modules most of which are never imported.
            options = ["--no-deps", "--require-hashes", "--no-compile", "--only-binary", ":all:", "-r", str(path)]
            self._run(self._pip("install", *options), f"{len(names)} packages of {path.name}", packages=True)

    def _install_torch(self) -> None:
        version = self.torch_version()
        configured, pytorch = torch_attempts(version)
        label = f"torch {version} for CPU"
        try:
            self._run(self._pip("install", *configured), label)
        except CogpressError:
            say(f"  not in the configured package index: trying {PYTORCH_CPU_INDEX}")
            self._run(self._pip("install", *pytorch), label)

    def _uninstall_others(self, kind: str) -> None:
        """An update leaves what the locks no longer name: take it out, so that it equals a new one."""
        from importlib import metadata  # slow to import, and `enter` has milliseconds

        wanted = {"pip", "torch"}.union(*(locked_names(path.read_text(encoding="utf-8")) for path in self.locks(kind)))
        folders = [str(path) for path in self.venv.glob("lib/python*/site-packages")]
        others = sorted({normalized(d.metadata["Name"]) for d in metadata.distributions(path=folders)} - wanted)
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
            env=clean_environment(os.environ),
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
            raise CogpressError(explain(label, lines, self.log))

    def _read(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        assert process.stdout is not None
        with open(self.log, "a", encoding="utf-8") as log:
            for line in process.stdout:
                line = without_credentials(line)
                lines.append(line.rstrip())
                log.write(line)
                log.flush()

    def _installed(self, lines: list[str]) -> str:
        """How far pip is. While it installs, it prints nothing: count what has appeared on disk."""
        if any(line.startswith("Installing collected packages") for line in lines):
            return f"{len(list(self.venv.glob('lib/python*/site-packages/*.dist-info')))} installed"
        found = sum(line.startswith(("Collecting ", "Requirement already satisfied")) for line in lines)
        return f"{found} collected"


class Progress:
    """A step's live line: rewritten in place on a terminal, elsewhere a new line every 15 seconds."""

    def __init__(self, label: str, tells_end: bool = True) -> None:
        self.label = label
        self.tells_end = tells_end
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, detail: str) -> None:
        """Say how far it is, where that is due."""
        now = time.monotonic()
        if now - self.shown < (0.3 if self.live else 15):
            return
        self.shown = now
        text = f"  {self.label}: {detail + ', ' if detail else ''}{now - self.started:.0f} s"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{text[:width]}", end="", file=sys.stderr, flush=True)
        else:
            say(text)

    def end(self, succeeded: bool) -> None:
        """Say how long it took."""
        if self.live:
            print("\r\033[K", end="", file=sys.stderr)
        if self.tells_end or not succeeded:
            say(f"  {self.label}: {'done' if succeeded else 'stopped'} in {time.monotonic() - self.started:.0f} s")


def say(text: str) -> None:
    """Progress goes to standard error: standard output is the script's own."""
    print(text, file=sys.stderr, flush=True)


def check_platform(system: str, machine: str, libc: tuple[str, str]) -> None:
    """The locked packages exist as binaries for Linux on x86-64 with glibc only.

    Raises:
        CogpressError: this is another.
    """
    needs = "cogpress needs Linux on x86-64 with glibc {}.{} or newer".format(*OLDEST_GLIBC)
    advice = "Use such a machine, or a container or virtual machine of that kind."
    if not system.startswith("linux") or machine.lower() not in ("x86_64", "amd64"):
        raise CogpressError(f"{needs}; this is {system} on {machine}. {advice}")
    if libc[0] != "glibc":
        raise CogpressError(f"{needs}; this Linux has another C library. {advice}")
    if tuple(int(part) for part in re.findall(r"\d+", libc[1])[:2]) < OLDEST_GLIBC:
        raise CogpressError(f"{needs}; this one has {libc[1]}. {advice}")


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


def find_interpreter() -> tuple[str, Version]:
    """A Python to make the environment with: the running one, or else one on PATH.

    Raises:
        CogpressError: none fits, or the one that does has no venv module.
    """
    running: str = getattr(sys, "_base_executable", "") or sys.executable
    names = [f"python{dotted(version)}" for version in PYTHONS]
    candidates = [running, *(path for path in map(shutil.which, names) if path)]
    incomplete = None
    for candidate in candidates:
        version, complete = probe(candidate)
        if version not in PYTHONS:
            continue
        if complete:
            return candidate, version
        incomplete = incomplete or (candidate, version)
    if incomplete:
        path, version = incomplete
        raise CogpressError(
            f"{path} has no venv module. Install it (Debian, Ubuntu: apt-get install python{dotted(version)}-venv), "
            "then run again."
        )
    wanted = f"{', '.join(map(dotted, PYTHONS[:-1]))} or {dotted(PYTHONS[-1])}"
    first = f"python{dotted(PYTHONS[0])}"
    raise CogpressError(
        f"cogpress needs Python {wanted}; this is {platform.python_version()}, and none of those is on PATH. Install "
        f"one (Debian, Ubuntu: apt-get install {first} {first}-venv), then run again."
    )


def probe(python: str) -> tuple[Version | None, bool]:
    """An interpreter's version and whether it can make environments; no version where it does not even start."""
    code = "import sys; print(*sys.version_info[:2], flush=True); import venv, ensurepip, ssl"
    try:
        done = subprocess.run([python, "-I", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None, False
    numbers = done.stdout.split()
    return ((int(numbers[0]), int(numbers[1])), done.returncode == 0) if len(numbers) == 2 else (None, False)


def torch_attempts(version: str) -> list[list[str]]:
    """pip's arguments for torch's CPU build, in the order they are tried.

    The configured index first: it may be a mirror that has it, and where it has not, the answer comes at once.
    Alone and without dependencies, because PyTorch's index has other packages too, in builds that are not locked.
    """
    torch = ["--no-deps", "--no-compile", "--only-binary", ":all:", "--retries", "1", f"torch=={version}+cpu"]
    return [torch, ["--index-url", PYTORCH_CPU_INDEX, "--timeout", "15", *torch]]


def locked_names(lock: str) -> list[str]:
    """The packages that a lock file names."""
    return [normalized(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", lock, re.M)]


def normalized(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def clean_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Without the settings that would make pip or Python work in another place than the new environment."""
    unwanted = {"PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
    kept = {name: value for name, value in variables.items() if name not in unwanted}
    # Set, not left out: these two may also come from a pip.conf, which variables win over.
    pip = {"PIP_USER": "0", "PIP_REQUIRE_HASHES": "0", "PIP_PROGRESS_BAR": "off"}
    return {**kept, **pip, "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1", "NO_COLOR": "1"}


def without_credentials(text: str) -> str:
    """The text with the user and password of every URL in it left out."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


_CAUSES = (
    (r"No space left on device", "the disk is full. Make room and run again."),
    (
        r"DO NOT MATCH THE HASHES",
        "a package's file is not the one that was locked. Your package index serves another: use one that mirrors the "
        "public one.",
    ),
    (
        r"Temporary failure in name resolution|Name or service not known|Failed to establish a new connection|"
        r"Network is unreachable|Connection refused|ConnectTimeoutError|ReadTimeoutError|ProxyError|SSLError|"
        r"CERTIFICATE_VERIFY_FAILED",
        "the package index can not be reached. Check the network and pip's configuration (`pip config list`), then run "
        "again.",
    ),
    (
        r"No matching distribution found for (\S+)",
        "{0} is not in the package index. Check pip's configuration (`pip config list`), then run again.",
    ),
)


def explain(label: str, output: Sequence[str], log: Path) -> str:
    """What went wrong in a step and what to do, with the end of its output and where the rest is."""
    text = "\n".join(output)
    cause = "see why below."
    for pattern, words in _CAUSES:
        match = re.search(pattern, text)
        if match:
            cause = words.format(*match.groups())
            break
    tail = "\n".join("  " + line for line in [line for line in output if line.strip()][-6:])
    return (
        f"Setting up the environment stopped at '{label}': {cause} All of its output is in {log}; the end is:\n{tail}"
    )


def dotted(version: Version) -> str:
    """`(3, 11)` as `3.11`."""
    return ".".join(map(str, version))
