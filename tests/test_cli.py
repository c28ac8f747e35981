"""The scripts' options, help, messages and exit statuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cogpress import cli
from cogpress.cog import client
from cogpress.cog.process import free_port
from cogpress.errors import CogpressError
from tests import Script

ROOT = Path(__file__).resolve().parents[1]


def test_a_users_mistake_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise CogpressError("model.yaml is wrong [here]. Correct it.")

    with pytest.raises(SystemExit) as stopped:
        cli.run(fails)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "Error: model.yaml is wrong [here]. Correct it.\n"


def test_ctrl_c_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        cli.run(interrupted)
    assert stopped.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_steps_say_what_and_how_long() -> None:
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    with cli.step("Merge", console) as say:
        say("14 layers")
    with cli.step("Pack", console):
        pass
    lines = console.export_text().splitlines()
    assert lines[0] == "▸ Merge"
    assert lines[1].startswith("✓ Merge: 14 layers  0.0 s")
    assert lines[3].startswith("✓ Pack  0.0 s")


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "scripts").iterdir() if path.is_file()))
def test_every_script_has_help(name: str, script: Script) -> None:
    status, out, _ = script(name, "--help")
    assert status == 0
    assert f"usage: scripts/{name}" in out


@pytest.mark.slow
def test_scripts_run_by_themselves() -> None:
    """As a user starts them, without this process's imports and path."""
    shown = subprocess.run([ROOT / "scripts" / "serve", "--help"], capture_output=True, text=True, cwd="/")
    assert shown.returncode == 0, shown.stderr
    assert "usage: scripts/serve" in shown.stdout
    assert "Traceback" not in shown.stderr


def test_scripts_stay_thin() -> None:
    for path in (*(ROOT / "scripts").iterdir(), ROOT / "predict.py", ROOT / "train.py"):
        most = 160 if path.name == "predict.py" else 150  # it is a form: nearly all of it describes inputs
        assert len(path.read_text().splitlines()) < most, path


def test_predict_names_a_wrong_input_before_anything_starts(script: Script) -> None:
    status, _, error = script("predict", "-i", "promt=hi")
    assert status == 1
    assert error.startswith("Error: There is no input 'promt'.")


@pytest.mark.slow
def test_train_names_a_missing_file_without_a_stack_trace(script: Script, tmp_path: Path) -> None:
    status, _, error = script("train", "--train-data", tmp_path / "none.jsonl", "--run", tmp_path / "run")
    assert status == 1
    assert "none.jsonl does not exist" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "scripts").iterdir() if path.is_file()))
def test_a_script_reaches_its_environment_on_a_bare_python(name: str) -> None:
    """A new user's Python has none of the packages that the environment brings."""
    path = ROOT / "scripts" / name
    head, entered, _ = path.read_text().partition("\nenvironment.enter()\n")
    head = head if entered else head.partition("\ndef ")[0]  # makes the environment, or the locks
    program = f"__file__ = {str(path)!r}\n{head}"
    done = subprocess.run([sys.executable, "-S", "-I", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SAYS = """
import cog
from cog import BaseRunner, ConcatenateIterator, Input

class Runner(BaseRunner):
    @cog.streaming
    def run(self, text: str = Input(description="What to say."), times: int = Input(default=2, ge=1, le=3)
    ) -> ConcatenateIterator[str]:
        for _ in range(times):
            yield f"{text} "
        self.record_metric("output_token_count", times)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a small runner and the scripts that serve and ask, which take this Python as it is."""
    (tmp_path / "predict.py").write_text(SAYS)
    (tmp_path / "cog.yaml").write_text('run: "predict.py:Runner"\n')
    (tmp_path / "cogpress").symlink_to(ROOT / "cogpress")
    (tmp_path / "scripts").mkdir()
    for name in ("serve", "predict"):
        source = (ROOT / "scripts" / name).read_text()
        assert "\nenvironment.enter()\n" in source
        (tmp_path / "scripts" / name).write_text(source.replace("\nenvironment.enter()\n", "\n"))
    return tmp_path


def started(project: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(project / "scripts" / name), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(project: Path, *arguments: str) -> tuple[int, str, str]:
    asked = started(project, "predict", *arguments)
    out, error = asked.communicate(timeout=60)
    return asked.returncode, out, error


@pytest.mark.slow
def test_serve_and_predict_from_a_shell(project: Path) -> None:
    port = free_port("127.0.0.1")
    serving = started(project, "serve", "--port", str(port))
    try:
        assert serving.stdout is not None
        ready = next(line for line in serving.stdout if line.startswith("Ready"))
        url = f"http://127.0.0.1:{port}"
        assert f"Ready at {url}." in ready
        assert said(project, "--url", url, "-i", "text=ha", "-i", "times=3") == (
            0,
            "ha ha ha \n",
            "output_token_count 3\n",
        )
        status, out, _ = said(project, "--url", url, "-i", "text=ha", "--json")
        assert (status, json.loads(out)["output"]) == (0, ["ha ", "ha "])
        status, out, error = said(project, "--url", url, "-i", "text=ha", "-i", "times=4")
        assert (status, out, error) == (1, "", "Error: -i times: '4' is not between 1 and 3.\n")
        taken = started(project, "serve", "--port", str(port))
        assert "cannot be used: Address already in use" in taken.communicate(timeout=60)[1]
        assert taken.returncode == 1
    finally:
        serving.send_signal(signal.SIGINT)
        _, error = serving.communicate(timeout=60)
    assert serving.returncode == 130
    assert error.endswith("Stopped.\n")
    assert client.health(url) is None


@pytest.mark.slow
def test_predict_starts_a_server_of_its_own_for_weights(project: Path) -> None:
    (project / "weights").mkdir()
    status, out, _ = said(project, "--weights", str(project / "weights"), "-i", "text=ho")
    assert (status, out) == (0, "ho ho \n")
    assert "Server shutdown complete" in (project / "runs" / "predict.log").read_text()
    status, _, error = said(project, "--weights", str(project / "none"), "-i", "text=ho")
    assert status == 1
    assert error.startswith(f"Error: There are no weights at {project / 'none'}.")
