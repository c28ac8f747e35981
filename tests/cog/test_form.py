"""The form: what `model.yaml` describes, as the inputs of `run()`, in Cog's schema and in the prompt."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from rich.console import Console

from cogpress import config, prompts
from cogpress.cog import form, schema
from cogpress.errors import CogpressError
from cogpress.options import InputName

ROOT = Path(__file__).resolve().parents[2]

FIELDS: dict[str, Any] = {
    "question": {"description": "What to look up.", "maximum": 200, "example": "how many"},
    "columns": {"description": "The columns.", "type": "list", "minimum": 1},
    "notes": {"description": 'Say "why", it\'s read.', "type": "long text", "default": ""},
    "limit": {"description": "Rows.", "type": "number", "minimum": 1, "maximum": 1000, "default": 10},
    "style": {"description": "How.", "type": "choice", "choices": ["short", "long"], "default": "short"},
    "strict": {"description": "Only what is known.", "type": "boolean", "default": False},
}
TEMPLATE = "{question}|{columns}|{notes}|{limit}|{style}|{strict}"


def settings(fields: dict[str, Any] = FIELDS, template: str = TEMPLATE, **more: Any) -> config.Config:
    return config.parse({"prompt": {"template": template, "fields": fields}, **more}, "model.yaml")


def runner(folder: Path, made: config.Config) -> Path:
    shutil.copy(ROOT / "predict.py", folder)
    form.write(folder / "predict.py", made)
    return folder


def test_the_repositorys_form_is_that_of_its_model_yaml() -> None:
    assert form.stale(ROOT / "predict.py", config.load(ROOT / "model.yaml")) == []


def test_the_inputs_are_those_that_options_names() -> None:
    assert sorted(one.name for one in form.inputs(config.Config())) == sorted(get_args(InputName))


def test_the_fields_come_first_and_required_ones_have_no_default(tmp_path: Path) -> None:
    found = schema.inputs(runner(tmp_path, settings()), "predict.py:Runner")
    names = list(found)
    assert names[:7] == [*FIELDS, "max_tokens"]
    assert names[-4:] == ["system_prompt", "prompt", "messages", "fields"]
    assert [name for name, one in found.items() if one["required"]] == ["question", "columns"]
    assert "default" not in found["question"]
    assert found["question"]["maxLength"] == 200
    assert found["columns"]["description"] == "The columns. One per line, or separated by commas."
    assert (found["limit"]["type"], found["limit"]["minimum"], found["limit"]["maximum"]) == ("number", 1.0, 1000.0)
    assert (found["limit"]["default"], found["style"]["default"], found["strict"]["default"]) == (10.0, "short", False)
    assert found["style"]["enum"] == ["short", "long"]
    assert found["strict"]["type"] == "boolean"
    assert found["notes"]["description"] == 'Say "why", it’s read.'  # noqa: RUF001 - Cog would keep an escape


def test_a_field_that_is_not_required_may_be_left_out(tmp_path: Path) -> None:
    made = settings({"question": {"description": "x", "required": False}}, "{question}")
    found = schema.inputs(runner(tmp_path, made), "predict.py:Runner")
    assert found["question"]["nullable"]
    assert not found["question"]["required"]


def test_without_described_fields_the_prompt_comes_first() -> None:
    assert [one.name for one in form.inputs(config.Config())][:2] == ["prompt", "system_prompt"]


def test_what_is_hidden_is_no_input(tmp_path: Path) -> None:
    made = settings(serve={"form": {"hide": ["grammar", "tools", "logit_bias", "messages"]}})
    found = schema.inputs(runner(tmp_path, made), "predict.py:Runner")
    assert not found.keys() & {"grammar", "tools", "logit_bias", "messages"}
    assert "regex" in found


def test_what_is_written_is_formatted_and_has_no_escapes(tmp_path: Path) -> None:
    fields = {
        **FIELDS,
        "style": {"description": "x" * 150, "type": "choice", "choices": [f"{n:030}" for n in range(9)]},
    }
    root = runner(tmp_path, settings(fields))
    shutil.copy(ROOT / "pyproject.toml", root)
    for command in (("format", "--check"), ("check",)):
        done = subprocess.run(
            [Path(sys.executable).parent / "ruff", *command, "predict.py"], cwd=root, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
    assert "\\" not in form.written(settings(fields))
    assert len(schema.inputs(root, "predict.py:Runner")["style"]["enum"]) == 9


def test_writing_again_changes_nothing_and_a_stale_form_is_told(tmp_path: Path) -> None:
    made = settings()
    path = runner(tmp_path, made) / "predict.py"
    assert not form.write(path, made)
    assert form.stale(path, made) == []
    assert any(
        "limit" in line
        for line in form.stale(path, settings({**FIELDS, "limit": {**FIELDS["limit"], "maximum": 9, "default": 9}}))
    )
    swapped = {name: FIELDS[name] for name in reversed(FIELDS)}
    assert form.stale(path, settings(swapped)) == ["the order of the inputs"]
    path.write_text(path.read_text().replace(form.END, ""))
    with pytest.raises(CogpressError, match="needs the lines"):
        form.write(path, made)


@pytest.mark.parametrize(
    ("fields", "template", "said"),
    [
        ({"temperature": {"description": "x"}}, "{temperature}", "the field temperature is named like an input"),
        ({"prompt": {"description": "x"}}, "{prompt}", "the field prompt is named like an input"),
        ({"class": {"description": "x"}}, "{class}", "the field class cannot be an input's name"),
        ({"self": {"description": "x"}}, "{self}", "self is named like"),
        ({"wrong": {"description": "x"}}, "{question}", "describes wrong, which is no field of the template"),
        ({"question": {"description": "x"}}, "{question} {columns}", "lacks a description of columns"),
        ({"question": {}}, "{question}", "prompt.fields.question: needs a description"),
        ({"question": {"description": " "}}, "{question}", "prompt.fields.question: needs a description"),
        ({"q": {"description": "x", "type": "choice"}}, "{q}", "prompt.fields.q: needs choices"),
        ({"q": {"description": "x", "choices": ["a"]}}, "{q}", "a text has no choices"),
        ({"q": {"description": "x", "type": "number", "maximum": 2**53}}, "{q}", "below 2..53"),
        ({"q": {"description": "x", "type": "number", "minimum": 3, "maximum": 2}}, "{q}", "minimum 3 is above"),
        ({"q": {"description": "x", "type": "number", "default": "3"}}, "{q}", "default '3' is no number"),
        ({"q": {"description": "x", "type": "number", "maximum": 2, "default": 3}}, "{q}", "default 3 is no number"),
        ({"q": {"description": "x", "type": "boolean", "minimum": 0}}, "{q}", "a boolean has no bounds"),
        ({"q": {"description": "x", "type": "list", "default": "a"}}, "{q}", "default 'a' is no list"),
        ({"q": {"description": "x", "default": "a\nb"}}, "{q}", "no line break"),
        ({"q": {"description": "x", "minimum": 0.5}}, "{q}", "whole numbers"),
        ({"q": {"description": "x", "type": "file"}}, "{q}", "prompt.fields.q.type"),
        ({"q": {"description": "x", "label": "y"}}, "{q}", "prompt.fields.q.label is not an option"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], template: str, said: str) -> None:
    with pytest.raises(CogpressError, match=said):
        settings(fields, template)


@pytest.mark.parametrize("hide", [["max_tokens"], ["gramar"]])
def test_what_cannot_be_hidden_is_refused(hide: list[str]) -> None:
    with pytest.raises(CogpressError, match="form"):
        settings(serve={"form": {"hide": hide}})


def test_hiding_every_way_to_ask_is_refused() -> None:
    made = config.parse({"serve": {"form": {"hide": ["prompt", "messages", "fields"]}}}, "model.yaml")
    with pytest.raises(CogpressError, match="leaves nothing to ask with"):
        form.inputs(made)


LISTS = ["a.b\nc", "a.b\n c \n\n", "a.b, c", '["a.b", "c"]', ["a.b", "c"], "a.b\r\nc"]


@pytest.mark.parametrize("value", LISTS)
def test_a_list_is_the_trainings_however_it_is_typed(value: Any) -> None:
    assert prompts.field_text("columns", value, settings().prompt) == "a.b\nc"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("limit", 8, "8"),
        ("limit", 8.0, "8"),
        ("limit", "8", "8"),
        ("limit", 2.5, "2.5"),
        ("strict", True, "True"),
        ("strict", "false", "False"),
        ("style", "long", "long"),
        ("columns", ["with, comma"], "with, comma"),
        ("columns", "with, comma\n", "with, comma"),
        ("question", "a\nb", "a\nb"),
    ],
)
def test_a_value_has_one_text(name: str, value: Any, text: str) -> None:
    assert prompts.field_text(name, value, settings().prompt) == text


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("limit", 0, "at least 1"),
        ("limit", "many", "must be a number"),
        ("limit", True, "must be a number"),
        ("limit", float("nan"), "must be a number"),
        ("columns", [], "at least 1"),
        ("question", "x" * 201, "at most 200"),
        ("style", "medium", "choose one of short, long"),
        ("strict", "perhaps", "true or false"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any, said: str) -> None:
    with pytest.raises(CogpressError, match=f"Field {name} .*{said}"):
        prompts.field_text(name, value, settings().prompt)


def test_a_row_may_leave_out_what_has_a_default() -> None:
    made = settings().prompt
    row = prompts.Question(fields={"question": "q", "columns": ["a"]})
    assert prompts.conversation(row, made)[-1]["content"] == "q|a||10|short|False"
    with pytest.raises(CogpressError, match="lacks columns"):
        prompts.conversation(prompts.Question(fields={"question": "q"}), made)


def test_programs_get_values_for_what_they_replace(tmp_path: Path) -> None:
    fields = {**FIELDS, "size": {"description": "x", "type": "choice", "choices": ["s", "m"]}}
    found = schema.inputs(runner(tmp_path, settings(fields, TEMPLATE + "{size}")), "predict.py:Runner")
    assert form.completed({"prompt": "hi"}, found) == {"prompt": "hi", "question": "", "columns": "", "size": "s"}
    assert form.completed({"question": "hi"}, found) == {"question": "hi"}


def test_the_table_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(form.table(settings()))
    shown = capture.get()
    assert max(map(len, shown.splitlines())) <= 80
    assert "question" in shown
    assert "number, 1 to 1000" in shown
    assert "[a-z]+" in shown  # no markup


def test_the_page_that_describes_the_form_is_valid() -> None:
    text = (ROOT / "docs" / "serving.md").read_text()
    example = text.partition("<!-- form -->")[2].partition("```yaml\n")[2].partition("```")[0]
    found = form.inputs(config.parse(yaml.safe_load(example), "the example"))
    assert found[0].required
    assert "grammar" not in [one.name for one in found]
