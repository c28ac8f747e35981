"""What the scripts take and what they say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cogpress import cli, schema
from cogpress.errors import CogpressError

ROOT = Path(__file__).resolve().parents[1]
FIELDS: dict[str, dict[str, Any]] = {
    "prompt": {"type": "string"},
    "count": {"type": "integer"},
    "share": {"type": "number"},
    "flag": {"type": "boolean"},
    "file": {"type": "string", "format": "uri"},
}


def test_inputs_take_the_types_of_the_form(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hi=there")
    pairs = ["prompt=a=b", "count=3", "share=0.5", "flag=True", f"file=@{tmp_path / 'a.txt'}"]
    assert cli.parse_inputs(pairs, FIELDS) == {
        "prompt": "a=b",
        "count": 3,
        "share": 0.5,
        "flag": True,
        "file": "data:text/plain;base64,aGk9dGhlcmU=",
    }
    assert cli.parse_inputs([f"prompt=@{tmp_path / 'a.txt'}"], FIELDS) == {"prompt": "hi=there"}


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("prompt", "name=value"),
        ("other=1", "no input 'other'.*prompt, count"),
        ("count=many", "is no whole number"),
        ("flag=yes", "neither true nor false"),
        ("prompt=@/no/file", "can not be read"),
    ],
)
def test_wrong_inputs_are_explained(pair: str, said: str) -> None:
    with pytest.raises(CogpressError, match=said):
        cli.parse_inputs([pair], FIELDS)


def test_training_options_are_the_training_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.options(ROOT, "train.py:train")
    options = vars(parser.parse_args(["--rank", "8", "--learning-rate", "0.01", "--quantization", "int8"]))
    assert set(options) == set(schema.inputs(ROOT, "train.py:train"))
    assert (options["rank"], options["learning_rate"], options["quantization"]) == (8, 0.01, "int8")
    assert options["epochs"] is None
    for wrong, said in (
        (["--rank", "0"], "0 is not between 1 and 512"),
        (["--rank", "x"], "no whole number"),
        (["--quantization", "int3"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
        assert said in capsys.readouterr().err


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


@pytest.mark.parametrize("script", ["demo", "train", "serve", "predict", "setup", "bench"])
def test_every_script_explains_itself(script: str) -> None:
    shown = subprocess.run([sys.executable, ROOT / "scripts" / script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert f"usage: scripts/{script}" in shown.stdout
    assert "Traceback" not in shown.stderr


def test_scripts_stay_thin() -> None:
    for path in (*(ROOT / "scripts").iterdir(), ROOT / "predict.py", ROOT / "train.py"):
        assert len(path.read_text().splitlines()) < 150, path


def test_predict_names_a_wrong_input_before_anything_starts() -> None:
    command = [sys.executable, ROOT / "scripts" / "predict", "-i", "promt=hi"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr.startswith("Error: There is no input 'promt'.")


def test_train_names_a_missing_file_without_a_stack_trace(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "scripts" / "train", "--train-data", str(tmp_path / "none.jsonl")]
    shown = subprocess.run([*command, "--run", str(tmp_path / "run")], capture_output=True, text=True)
    assert shown.returncode == 1
    assert "none.jsonl does not exist" in shown.stderr
    assert "Traceback" not in shown.stderr
