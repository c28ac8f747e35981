"""Environments: decisions, messages, and whole set-ups from a folder of tiny wheels."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from cogpress.errors import CogpressError
from cogpress.setup import environment, interpreter, uv
from cogpress.setup.environment import Environment

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("cpu.lock", "gpu.lock", "gpu-dev.lock", "quantize.lock", "quantize-gpu.lock")
NAMED = ("base.in", "quantize.in")
LOCKS = [ROOT / "requirements" / name for name in NAMES]
INSTALLER = ROOT / "requirements" / environment.INSTALLER
CLIENTS = ROOT / "requirements" / "clients.lock"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The parts of a repository that the environment is made from."""
    folder = tmp_path / "repository"
    (folder / "requirements").mkdir(parents=True)
    (folder / "requirements" / "base.in").write_text("# training\ntorch==2.13.0  # a reason\n")
    for name in NAMES:
        (folder / "requirements" / name).write_text("")
    return folder


def mark(repository: Path, **state: str) -> Environment:
    """An environment that says this of itself."""
    made = Environment(repository)
    made.python.parent.mkdir(parents=True, exist_ok=True)
    made.python.touch()
    complete = {"state": "complete", "kind": "cpu", "locks": made.digest("cpu")}
    (made.venv / environment.STATE).write_text(json.dumps({**complete, **state}))
    return made


def test_ready_while_it_agrees_with_the_locks(repository: Path) -> None:
    made = mark(repository)
    assert made.ready()
    assert made.ready("cpu")
    assert not made.ready("gpu")
    (repository / "requirements" / "gpu.lock").write_text("other==1\n")
    assert made.ready(), "the GPU's lock is not its own"
    (repository / "requirements" / "cpu.lock").write_text("other==1\n")
    assert not made.ready()


def test_not_ready_once_torch_changes_or_python_is_gone(repository: Path) -> None:
    made = mark(repository)
    made.python.unlink()
    assert not made.ready()
    made = mark(repository)
    (repository / "requirements" / "base.in").write_text("torch==2.14.0\n")
    assert not made.ready()


def test_the_gpu_environment_is_made_from_both_of_its_locks(repository: Path) -> None:
    made = mark(repository, kind="gpu", locks=Environment(repository).digest("gpu"))
    assert made.ready()
    (repository / "requirements" / "gpu-dev.lock").write_text("other==1\n")
    assert not made.ready()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "incomplete", "kind": "cpu"}', "{}"])
def test_a_damaged_or_unfinished_state_is_not_ready(repository: Path, content: str) -> None:
    made = mark(repository)
    (made.venv / environment.STATE).write_text(content)
    assert not made.ready()


def test_why_it_is_made_anew(tmp_path: Path) -> None:
    venv, python = tmp_path / ".venv", tmp_path / ".venv" / "bin" / "python"
    assert "once" in str(environment.why_anew(None, "cpu", venv, python))
    python.parent.mkdir(parents=True)
    python.touch()
    complete = {"state": "complete", "kind": "cpu"}
    assert environment.why_anew(complete, "cpu", venv, python) is None
    assert "interrupted" in str(environment.why_anew({"state": "incomplete", "kind": "cpu"}, "cpu", venv, python))
    assert "again for gpu" in str(environment.why_anew(complete, "gpu", venv, python))
    python.unlink()
    assert "gone" in str(environment.why_anew(complete, "cpu", venv, python))


def test_a_foreign_environment_is_left_alone(repository: Path) -> None:
    (repository / ".venv").mkdir()
    precious = repository / ".venv" / "precious"
    precious.touch()
    with pytest.raises(CogpressError, match="not created by scripts/setup"):
        Environment(repository).setup()
    assert precious.exists()


@pytest.mark.parametrize(
    ("system", "machine", "libc", "said"),
    [
        ("darwin", "arm64", ("", ""), "this is darwin on arm64"),
        ("linux", "aarch64", ("glibc", "2.39"), "this is linux on aarch64"),
        ("win32", "AMD64", ("", ""), "this is win32 on AMD64"),
        ("linux", "x86_64", ("", ""), "a different C library"),
        ("linux", "x86_64", ("glibc", "2.28"), "this one has 2.28"),
    ],
)
def test_other_platforms_are_refused(system: str, machine: str, libc: tuple[str, str], said: str) -> None:
    with pytest.raises(CogpressError, match="Linux on x86-64") as error:
        interpreter.check_platform(system, machine, libc)
    assert said in str(error.value)


def test_this_platform_is_accepted() -> None:
    interpreter.check_platform("linux", "x86_64", ("glibc", "2.31"))
    interpreter.check_platform("linux", "AMD64", ("glibc", "2.41.9000"))


def test_a_full_disk_is_noticed_before_the_download(tmp_path: Path) -> None:
    environment.check_disk(6 * 10**9, 6, tmp_path)
    with pytest.raises(CogpressError, match=r"needs 6 GB at .*, where 1\.2 GB are free"):
        environment.check_disk(12 * 10**8, 6, tmp_path)


def fake_python(folder: Path, name: str, version: str, complete: bool = True) -> Path:
    """A program that answers `probe` as a Python of that version would."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho {version}\nexit {0 if complete else 1}\n")
    path.chmod(0o755)
    return path


def test_the_running_python_is_taken_where_it_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, "python3.11", "3 11")
    running = fake_python(tmp_path, "running", "3 13")
    monkeypatch.setattr(sys, "_base_executable", str(running))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert interpreter.find_interpreter() == (str(running), (3, 13))


def test_else_one_on_the_path_that_really_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_base_executable", str(fake_python(tmp_path, "running", "3 8")))
    broken = tmp_path / "python3.11"
    broken.write_text("#!/bin/sh\nexit 127\n")
    broken.chmod(0o755)
    fake_python(tmp_path, "python3.12", "3 12", complete=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CogpressError, match=r"python3\.12 has no venv module.*apt-get install python3\.12-venv"):
        interpreter.find_interpreter()
    right = fake_python(tmp_path, "python3.13", "3 13")
    assert interpreter.find_interpreter() == (str(right), (3, 13))


def test_no_python_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "_base_executable", str(fake_python(tmp_path, "running", "3 8")))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CogpressError, match=r"3\.11, 3\.12 or 3\.13; this is .* none of those is on PATH"):
        interpreter.find_interpreter()


def test_probe_reads_a_real_python(tmp_path: Path) -> None:
    assert interpreter.probe(sys.executable) == (sys.version_info[:2], True)
    assert interpreter.probe(str(tmp_path / "absent")) == (None, False)


CONFIGURATION = """\
:env:.find-links='/other'
global.cert='/etc/ca.crt'
global.extra-index-url='https://a.example/simple\\nhttps://b.example/simple'
global.find-links='/wheels /more'
global.index-url='https://me:s3cret@mirror.example/simple'
install.index-url='https://install.example/simple'
install.no-index='true'
user.index-url='https://nobody.example'
"""


def test_pip_is_asked_where_packages_are() -> None:
    settings = uv.settings(CONFIGURATION)
    assert settings["index-url"] == "https://install.example/simple", "a command's own section wins over [global]"
    assert settings["find-links"] == "/other", "a variable wins over files"
    assert uv.variables(settings) == {
        "UV_DEFAULT_INDEX": "https://install.example/simple",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "SSL_CERT_FILE": "/etc/ca.crt",
    }
    assert uv.settings("") == uv.variables({}) == {}


def test_uv_verifies_hashes_and_keeps_to_no_index() -> None:
    command = uv.sync("python", ["a.lock", "b.lock"], {})
    assert command[-2:] == ["a.lock", "b.lock"]
    assert "--verify-hashes" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert "--no-index" not in command
    settings = {"no-index": "1", "find-links": "/wheels /more"}
    assert uv.sync("python", [], settings)[-5:] == ["--find-links", "/wheels", "--find-links", "/more", "--no-index"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "not the one that was locked"),
        ("ERROR: No matching distribution found for uv==0.13.9", "uv==0.13.9 is not in the package index"),
        (
            "WARNING: Retrying after NewConnectionError: Temporary failure in name resolution\n"
            "ERROR: No matching distribution found for uv==0.13.9",
            "could not reach",
        ),
        ("error: failed to write to file `/x`: No space left on device (os error 28)", "disk is full"),
        (
            "error: Failed to download `six==1.17.0`\n  cause: Hash mismatch for `six==1.17.0`",
            "not the one that was locked",
        ),
        ("error: Request failed after 3 retries in 11.3s\n  cause: Failed to fetch: https://x/", "could not reach"),
        (
            "error: No solution found when resolving dependencies\n  cause: Because there is no version of "
            "torch==2.13.0+cpu and you require torch==2.13.0+cpu, we can conclude that your requirements are "
            "unsatisfiable.",
            "torch==2.13.0+cpu is not in the package index",
        ),
        (
            "error: No solution found when resolving dependencies\n  cause: Because there is no version of "
            "torch==2.13.0+cpu and you\n           require torch==2.13.0+cpu, we can conclude that your requirements "
            "are\n           unsatisfiable.",
            "torch==2.13.0+cpu is not in the package index",
        ),
        ("error: something never seen before", "see below"),
    ],
)
def test_a_failure_says_what_to_do_and_shows_the_program_s_own_words(line: str, said: str) -> None:
    output = [f"Downloading package-{number}" for number in range(50)] + line.splitlines()
    text = uv.explain("the packages of cpu.lock", output)
    assert said in text.splitlines()[0]
    assert text.splitlines()[1:] == ["  " + part for part in line.splitlines() if not part.startswith("WARNING")]


@pytest.mark.parametrize("between", [" ", "\n           "])
def test_a_missing_torch_is_seen_wherever_uv_wraps_its_line(between: str) -> None:
    text = f"there is no version of torch==2.13.0+cpu and you{between}require torch==2.13.0+cpu, we can conclude"
    assert re.search(uv.TORCH_MISSING, text)
    assert not re.search(uv.TORCH_MISSING, text.replace("torch", "six"))


def test_a_failure_without_an_error_line_shows_its_end() -> None:
    text = uv.explain("the check that it imports", [f"line {number}" for number in range(50)])
    assert text.splitlines()[1:] == [f"  line {number}" for number in range(42, 50)]


def test_credentials_never_show() -> None:
    line = "Looking in indexes: https://me:s3cret@example.com/simple, https://t0ken@example.com/x"
    shown = uv.without_credentials(line)
    assert shown == "Looking in indexes: https://***@example.com/simple, https://***@example.com/x"
    assert "s3cret" not in uv.explain("x", [line])


def test_settings_that_install_elsewhere_are_dropped() -> None:
    given = {"PIP_TARGET": "/x", "PYTHONPATH": "/y", "PIP_USER": "1", "PIP_INDEX_URL": "https://example.com", "A": "b"}
    cleaned = environment.clean_environment({**given, "UV_NO_VERIFY_HASHES": "1"})
    assert not {"PIP_TARGET", "PYTHONPATH", "UV_NO_VERIFY_HASHES"} & cleaned.keys()
    assert cleaned["PIP_USER"] == "0"
    assert cleaned["PIP_INDEX_URL"] == "https://example.com"
    assert cleaned["A"] == "b"


@pytest.mark.parametrize("path", [*LOCKS, INSTALLER, CLIENTS], ids=lambda path: path.name)
def test_locks_are_exact_hashed_and_of_no_one_machine(path: Path) -> None:
    text = path.read_text()
    entries = re.split(r"^(?=[a-z0-9])", re.sub(r"^#.*\n", "", text, flags=re.M), flags=re.M)[1:]
    assert entries
    for entry in entries:
        assert re.fullmatch(r"[a-z0-9-]+==[^\s;]+( \\\n    --hash=sha256:[0-9a-f]{64})+\n", entry), entry[:80]
    assert not re.search(r"://|file:|--(extra-)?index-url|--find-links|-e |\s/", text)


@pytest.mark.parametrize("name", ["cpu.lock", "quantize.lock"])
def test_a_lock_for_cpus_has_no_cuda_and_nothing_that_needs_it(name: str) -> None:
    names = re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements" / name).read_text(), re.M)
    allowed = "nvidia-ml-py"  # Python only: it asks a driver for its GPUs, where there is one
    assert not [name for name in names if re.match(r"torch|nvidia-|cuda-|vllm$", name) and name != allowed]


def test_both_environments_have_the_same_torch() -> None:
    pins = [re.findall(r"^torch==\S+", (ROOT / "requirements" / name).read_text(), re.M) for name in NAMED]
    assert len(pins[0]) == 1
    assert pins[0] == pins[1]
    assert f"\n{pins[0][0]} " in (ROOT / "requirements" / "quantize-gpu.lock").read_text()


def test_every_direct_dependency_is_locked_at_the_version_asked_for() -> None:
    for inputs, locks in (
        ("cpu.in base.in dev.in", LOCKS[:1]),
        ("gpu.in base.in dev.in", LOCKS[1:3]),
        ("quantize.in", LOCKS[3:4]),
        ("quantize.in", LOCKS[4:]),
        ("installer.in", [INSTALLER]),
        ("clients.in", [CLIENTS]),
    ):
        locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", "".join(path.read_text() for path in locks), re.M))
        for name in inputs.split():
            text = (ROOT / "requirements" / name).read_text()
            for package, version in re.findall(r"^([A-Za-z0-9-]+)==(\S+)", text, re.M):
                if package != "torch" or "gpu" in locks[0].name:  # a lock for CPUs leaves torch out
                    assert locked[package.lower()] == version


def test_an_old_python_can_read_what_runs_first() -> None:
    """As far as a newer one can tell: Python 3.8's grammar, and imports from the standard library only."""
    import ast

    waiting, read = ["cogpress", "cogpress.setup.environment"], set[str]()
    while waiting:
        module = waiting.pop()
        read.add(module)
        place = ROOT.joinpath(*module.split("."))
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 8))):
            imported: list[str] = []
            if isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module in ("cogpress", "cogpress.setup"):
                imported = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                imported = [str(node.module)]
            ours = {name for name in imported if name.startswith("cogpress.")}
            waiting += ours - read
            assert {name.split(".")[0] for name in set(imported) - ours} <= sys.stdlib_module_names, module
    assert read == {
        "cogpress",
        "cogpress.errors",
        *(f"cogpress.setup.{name}" for name in ("environment", "interpreter", "libraries", "uv")),
    }


# Whole set-ups, with a real venv, pip and uv, from a folder of wheels in the index's place.


def wheel(folder: Path, name: str, version: str, code: str = "") -> str:
    """A wheel with one module; returns its sha256."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", code or f"version = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Small:
    """A repository whose environment holds a fake torch and what its lock names; `python` is this Python."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        wheel(self.wheels, "torch", "2.13.0+cpu")
        # uv in a few bytes: a module that runs the one of this environment.
        program = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
        code = f"import os, sys\nos.execv({program!r}, ['uv', *sys.argv[1:]])\n"
        digest = wheel(self.wheels, "uv", "1", code)
        (repository / "requirements" / environment.INSTALLER).write_text(f"uv==1 --hash=sha256:{digest}\n")
        self.repository = repository
        self.cache = folder / "cache"
        shutil.copytree(ROOT / "cogpress", repository / "cogpress", ignore=shutil.ignore_patterns("__pycache__"))
        self.change("environment", environment.CHECK, "import torch")
        (repository / "script").write_text(
            "import sys\nfrom cogpress.setup import environment\nenvironment.enter()\nprint(sys.prefix, sys.argv[1:])\n"
        )

    def change(self, module: str, old: str, new: str) -> None:
        """Change a constant of the repository's own copy of the package."""
        path = self.repository / "cogpress" / "setup" / f"{module}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    def lock(self, *packages: tuple[str, str, str]) -> None:
        """Make the lock name these packages, versions and hashes."""
        lines = [f"{name}=={version} --hash=sha256:{digest}\n" for name, version, digest in packages]
        (self.repository / "requirements" / "cpu.lock").write_text("".join(lines))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Run the script that enters the environment, outside it and without a package index."""
        others = ("PIP_", "UV_", "COGPRESS_")
        variables = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        variables |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels)}
        variables |= {"UV_CACHE_DIR": str(self.cache)}
        base = getattr(sys, "_base_executable", sys.executable)
        return subprocess.Popen(
            [base, "script", *arguments],
            cwd=self.repository,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """Exit status, output and messages of the script."""
        process = self.start(*arguments)
        output, messages = process.communicate(timeout=120)
        return process.returncode, output, messages

    def installed(self) -> set[str]:
        """The modules in the environment that came from the wheels."""
        modules = {path.stem for path in (self.repository / ".venv").glob("lib/python*/site-packages/*.py")}
        return modules & {"torch", "uv", "one", "two"}


@pytest.fixture
def small(tmp_path: Path, repository: Path) -> Small:
    return Small(tmp_path, repository)


@pytest.mark.slow
def test_a_script_sets_up_enters_updates_and_recovers(small: Small) -> None:
    one, two = wheel(small.wheels, "one", "1"), wheel(small.wheels, "two", "1")
    small.lock(("one", "1", one), ("two", "1", two))
    prefix = str(small.repository / ".venv")

    status, output, messages = small.run("a", "b c")
    assert (status, output) == (0, f"{prefix} ['a', 'b c']\n"), messages
    assert "Installed 3 packages" in messages
    assert small.installed() == {"torch", "one", "two", "uv"}
    assert list(small.repository.glob(".venv/lib/python*/site-packages/__pycache__/one.*.pyc")), "compiled"

    status, output, messages = small.run()
    assert (status, output, messages) == (0, f"{prefix} []\n", ""), "nothing to do, nothing said"

    small.lock(("one", "1", one))
    status, _, messages = small.run()
    assert status == 0
    assert "Uninstalled 1 package" in messages
    assert small.installed() == {"torch", "one", "uv"}, "two is gone, and pip and uv are there for the next update"
    assert (small.repository / ".venv" / "bin" / "pip").exists()

    small.lock(("one", "1", one), ("two", "1", "0" * 64))
    status, output, messages = small.run()
    assert (status, output) == (1, "")
    assert "not the one that was locked" in messages
    assert "Traceback" not in messages
    small.lock(("one", "1", one))
    status, _, messages = small.run()
    assert (status, messages) == (0, ""), "a failed update that changed nothing costs nothing"

    state = small.repository / ".venv" / environment.STATE
    state.write_text(json.dumps({"state": "incomplete", "kind": "cpu"}))
    leftover = small.repository / ".venv" / "leftover"
    leftover.touch()
    status, _, messages = small.run()
    assert status == 0
    assert "interrupted: starting again" in messages
    assert not leftover.exists()


@pytest.mark.slow
def test_another_environment_lies_beside_it(small: Small) -> None:
    """llmcompressor's, made from inside the main one: from its own lock, with its own mark."""
    one = wheel(small.wheels, "one", "1")
    (small.repository / "requirements" / "quantize.lock").write_text(f"one==1 --hash=sha256:{one}\n")
    (small.repository / "script").write_text(
        "from cogpress.setup.environment import *\n"
        "made = Environment(ROOT, QUANTIZE._replace(check='import torch, one'))\n"
        "made.ready('cpu') or made.setup(gpu=False)\n"
        "print(made.ready('cpu'), made.ready('gpu'), Environment(ROOT).ready())\n"
    )
    status, output, messages = small.run()
    assert (status, output) == (0, "True False False\n"), messages
    words = [line.split()[0] for line in messages.splitlines()]
    assert words == ["Setting", "Resolved", "Prepared", "Installed", f"{small.repository}/.venv-quantize"]
    assert (small.repository / ".venv-quantize" / environment.STATE).is_file()
    assert not (small.repository / ".venv").exists()
    assert small.run() == (0, "True False False\n", "")

    (small.repository / "requirements" / "cpu.lock").write_text("other==1\n")
    assert small.run()[2] == "", "the main environment's lock is not its own"
    wheel(small.wheels, "two", "1")
    (small.repository / "requirements" / "quantize.lock").write_text(f"two==1 --hash=sha256:{'0' * 64}\n")
    status, _, messages = small.run()
    assert status != 0
    assert "lock files have changed" in messages
    assert "not the one that was locked" in messages


@pytest.mark.slow
def test_two_commands_at_once_make_it_once(small: Small) -> None:
    small.lock(("one", "1", wheel(small.wheels, "one", "1")))
    guard = small.repository / ".cache" / "setup.lock"
    guard.parent.mkdir(exist_ok=True)
    with guard.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a third command that is at it
        both = [small.start(), small.start()]
        for one in both:
            assert one.stderr is not None
            assert "waiting for it" in one.stderr.readline()
    said = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert sorted("is ready" in one for one in said) == [False, True], said


@pytest.mark.slow
@pytest.mark.parametrize("there", [True, False])
def test_torch_is_looked_for_at_pytorch_too(small: Small, there: bool, tmp_path: Path) -> None:
    """In a page of links, as PyTorch's is: installed from there, or missed in plain words."""
    [torch] = small.wheels.glob("torch*")
    page = tmp_path / "pytorch"
    page.mkdir()
    torch.rename(page / torch.name)
    links = f'<html><body><a href="/{torch.name.replace("+", "%2B")}">{torch.name}</a><br/></body></html>'
    (page / "index.html").write_text(links if there else "<html><body></body></html>")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(page))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        small.change("uv", uv.PYTORCH_CPU, f"http://127.0.0.1:{server.server_port}/")
        status, output, messages = small.run()
        server.shutdown()
    assert "trying PyTorch's own" in messages
    assert "Traceback" not in messages
    if there:
        assert status == 0, messages
        assert small.installed() == {"torch", "uv"}
    else:
        assert (status, output) == (1, "")
        assert "torch==2.13.0+cpu is not in the package index" in messages


@pytest.mark.slow
def test_a_missing_system_library_is_named_before_anything_is_downloaded(small: Small) -> None:
    small.change("environment", "libnuma.so.1", "libno-such.so.9")
    status, output, messages = small.run()
    assert (status, output) == (1, "")
    assert messages.startswith("This system lacks libno-such.so.9, which torch or vLLM needs.")
    assert not (small.repository / ".venv").exists()


@pytest.mark.parametrize("name", ["setup", "test", "lock"])
def test_help_needs_no_environment(name: str, small: Small) -> None:
    shutil.copytree(ROOT / "scripts", small.repository / "scripts")
    base = getattr(sys, "_base_executable", sys.executable)
    command = [base, "-S", str(small.repository / "scripts" / name), "--help"]
    assert f"usage: scripts/{name}" in subprocess.check_output(command, text=True)
    assert not (small.repository / ".venv").exists()
