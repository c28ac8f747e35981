"""Cog's inputs in the shell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from cogpress.cog import options, schema
from cogpress.errors import CogpressError
from cogpress.options import Base, Train

ROOT = Path(__file__).resolve().parents[2]
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
    assert options.parse_inputs(pairs, FIELDS) == {
        "prompt": "a=b",
        "count": 3,
        "share": 0.5,
        "flag": True,
        "file": "data:text/plain;base64,aGk9dGhlcmU=",
    }
    assert options.parse_inputs([f"prompt=@{tmp_path / 'a.txt'}"], FIELDS) == {"prompt": "hi=there"}


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("prompt", "name=value"),
        ("other=1", "no input 'other'.*prompt, count"),
        ("count=many", "is not an integer"),
        ("flag=yes", "neither true nor false"),
        ("prompt=@/no/file", "Could not read"),
    ],
)
def test_wrong_inputs_are_explained(pair: str, said: str) -> None:
    with pytest.raises(CogpressError, match=said):
        options.parse_inputs([pair], FIELDS)


def test_training_options_are_the_training_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    parser = options.parser(ROOT, "train.py:train")
    given = vars(parser.parse_args(["--rank", "8", "--learning-rate", "0.01", "--quantization", "int8"]))
    assert set(given) == set(schema.inputs(ROOT, "train.py:train"))
    assert (given["rank"], given["learning_rate"], given["quantization"]) == (8, 0.01, "int8")
    assert given["epochs"] is None
    for wrong, said in (
        (["--rank", "0"], "0 is not between 1 and 512"),
        (["--rank", "x"], "not an integer"),
        (["--quantization", "int3"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(("name", "section"), [("optimizer", Train), ("quantization", Base)])
def test_a_training_input_has_the_choices_of_its_option(name: str, section: type[Train | Base]) -> None:
    found = schema.inputs(ROOT, "train.py:train")[name]["enum"]
    assert found == ["model.yaml", *get_args(section.model_fields[name].annotation)]


DESCRIBED: dict[str, dict[str, Any]] = {
    "text": {"type": "string", "required": True, "minLength": 2, "maxLength": 9, "pattern": "^[a-z@]+$"},
    "count": {"type": "integer", "minimum": 1, "maximum": 8},
    "low": {"type": "number", "minimum": 0.5},
    "style": {"type": "string", "enum": ["plain", "bold"]},
    "stop": {"type": "array"},
    "file": {"type": "string", "format": "uri"},
}


def test_lists_files_and_choices_are_taken(tmp_path: Path) -> None:
    (tmp_path / "count.txt").write_text("7")
    pairs = ["text=abc", "style=bold", 'stop=["a", "b"]', "file=https://example.com/a", f"count=@{tmp_path}/count.txt"]
    assert options.parse_inputs(pairs, DESCRIBED) == {
        "text": "abc",
        "style": "bold",
        "stop": ["a", "b"],
        "file": "https://example.com/a",
        "count": 7,
    }


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([], "The input text is missing"),
        (["text=ab", "text=cd"], "text is given twice"),
        (["text=a"], "1 characters long, not between 2 and 9"),
        (["text=ABC"], "does not match"),
        (["text=ab", "count=9"], "'9' is not between 1 and 8"),
        (["text=ab", "low=0.4"], "'0.4' is not at least 0.5"),
        (["text=ab", "low=nan"], "'nan' is not at least 0.5"),
        (["text=ab", "style=thin"], "'thin' is not one of plain, bold"),
        (["text=ab", "stop=a"], "is not JSON"),
        (["text=ab", 'stop={"a": 1}'], "is not a JSON list"),
        (["text=ab", "file=some.txt"], "write @ before its name"),
        (["text=@{binary}"], "is not a UTF-8 text file"),
    ],
)
def test_inputs_out_of_bounds_are_explained(tmp_path: Path, pairs: list[str], said: str) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(CogpressError, match=re.escape(said)):
        options.parse_inputs([pair.replace("{binary}", str(binary)) for pair in pairs], DESCRIBED)


def test_help_shows_bounds_choices_and_defaults() -> None:
    shown = " ".join(options.parser(ROOT, "train.py:train").format_help().split())
    assert "(between 1 and 512)" in shown
    assert "--quantization {model.yaml,nf4,int8,none}" in shown
    assert "(default: model.yaml)" in shown
