"""The form: the inputs of `run()` in `predict.py`, written from `model.yaml` between two marked lines.

Cog reads the inputs without running the file, so they are literals, and `scripts/form` writes them again after a change
of `prompt.fields` or `serve.form`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from cogpress.config import Config
from cogpress.errors import CogpressError
from cogpress.files import new_file
from cogpress.options import FormField

BEGIN = "        # --- inputs: scripts/form writes them from model.yaml ---"
END = "        # --- end of the inputs ---"

PROGRAMS = ("messages", "fields", "prompt")
"""Inputs that replace the form's fields."""

WIDTH = 120
"""Of a line; predict.py is formatted as ruff does it."""

LIST_HELP = "One per line, or separated by commas."
"""Ends the description of a list, by which the playground knows one."""


@dataclass(frozen=True)
class FormInput:
    """One parameter of `run()`.

    Attributes:
        kind: its annotation.
        description: in one line.
        default: `...` for a required input.
    """

    name: str
    kind: str
    description: str
    default: Any = ...
    ge: float | None = None
    le: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        """Whether Cog refuses a prediction without it."""
        return self.default is ...


_TEXT, _OPTIONAL = "str", "Optional[str]"

_PROMPT = FormInput("prompt", _TEXT, "Text to send to the model.", "")
_SYSTEM = FormInput(
    "system_prompt",
    _OPTIONAL,
    "Instructions for the whole conversation. Empty: those used in training.",
    None,
)
_SAMPLING = (
    FormInput(
        "max_tokens",
        "int",
        "Maximum number of tokens to generate; a token is about four characters.",
        512,
        ge=1,
        le=131072,
    ),
    FormInput(
        "temperature",
        "float",
        "Randomness: 0 always picks the most likely token, 1 samples as the model predicts.",
        0.0,
        ge=0.0,
        le=5.0,
    ),
    FormInput(
        "top_p",
        "float",
        "Sample from the most likely tokens that together reach this probability; 1 for all.",
        1.0,
        ge=0.01,
        le=1.0,
    ),
    FormInput("top_k", "int", "Sample from this many of the most likely tokens; 0 for all.", 0, ge=0, le=1000),
    FormInput(
        "min_p",
        "float",
        "Drop tokens less likely than this fraction of the most likely one; 0 drops none.",
        0.0,
        ge=0.0,
        le=1.0,
    ),
    FormInput(
        "stop",
        _TEXT,
        'Text that ends the answer and is left out; several as a JSON list, such as ["END", "##"].',
        "",
    ),
    FormInput(
        "seed",
        "Optional[int]",
        "Random seed, to repeat an answer when temperature is above 0. Empty: random.",
        None,
        ge=0,
        le=2**53 - 1,
    ),
    FormInput(
        "json_schema",
        _OPTIONAL,
        'JSON schema that the answer must follow, such as {"type": "object", "properties": {"op": {"enum": ["COUNT", '
        '"AVG"]}}, "required": ["op"]}.',
        None,
    ),
    FormInput(
        "regex",
        _OPTIONAL,
        "Regular expression that the whole answer must match, such as [A-Z]{3}-[0-9]+.",
        None,
    ),
    FormInput("choices", _OPTIONAL, 'The only answers allowed, as a JSON list, such as ["yes", "no"].', None),
    FormInput(
        "grammar",
        _OPTIONAL,
        'EBNF grammar that the answer must follow, such as root ::= "SELECT " [a-z]+.',
        None,
    ),
    FormInput(
        "tools",
        _OPTIONAL,
        'Functions that the model may call, as a JSON list of {"type": "function", "function": {"name": ..., '
        '"description": ..., "parameters": {...}}}. For models whose chat template supports tools.',
        None,
    ),
    FormInput(
        "thinking",
        "Optional[bool]",
        "Whether to reason before answering, for models that can do both. Empty: its default.",
        None,
    ),
    FormInput(
        "min_tokens",
        "int",
        "Minimum number of tokens to generate before the answer may end.",
        0,
        ge=0,
        le=131072,
    ),
    FormInput(
        "repetition_penalty",
        "float",
        "Above 1 makes tokens that are already in the prompt or the answer less likely.",
        1.0,
        ge=0.1,
        le=5.0,
    ),
    FormInput(
        "presence_penalty",
        "float",
        "Above 0 makes tokens that are already in the answer less likely, however often they occur.",
        0.0,
        ge=-2.0,
        le=2.0,
    ),
    FormInput(
        "frequency_penalty",
        "float",
        "Above 0 makes tokens less likely each time they occur in the answer.",
        0.0,
        ge=-2.0,
        le=2.0,
    ),
    FormInput(
        "logit_bias",
        _OPTIONAL,
        'Biases tokens from -100 to 100: a JSON object from a token, as text or id, to its bias, such as {"yes": 5}.',
        None,
    ),
    FormInput(
        "logprobs",
        "Optional[int]",
        "Report the log-probability of each token, and of this many of the most likely tokens at its position, in the "
        "metrics. Empty: none.",
        None,
        ge=0,
        le=20,
    ),
)
_ADAPTER = FormInput(
    "adapter",
    _TEXT,
    "Name of the adapter to use, for a model served with several. Empty: the base without one.",
    "",
)
_MESSAGES = FormInput(
    "messages",
    _OPTIONAL,
    'A whole conversation as a JSON list of {"role": "user" | "assistant" | "system", "content": "..."}, ending with '
    "the user. Replaces prompt and fields.",
    None,
)


def _fields_input(settings: Config) -> FormInput:
    """The fields as JSON, with a value for each."""
    described = settings.prompt.fields
    values = {name: described[name].example if name in described else None for name in settings.prompt.names}
    shown = json.dumps({name: "..." if value is None else value for name, value in values.items()}, ensure_ascii=False)
    if len(shown) > 200 or "\\" in shown or not shown.isprintable():
        shown = json.dumps(dict.fromkeys(values, "..."))
    return FormInput(
        "fields",
        _OPTIONAL,
        f"Values for the prompt template of this model, as a JSON object, such as {shown}. Replaces prompt.",
        None,
    )


def inputs(settings: Config) -> tuple[FormInput, ...]:
    """The inputs of a model, in the form's order.

    The template's fields come first, required ones without a default, then what steers the answer, and last what
    programs give instead of the fields. Without described fields, the prompt is the first.
    """
    fields = tuple(_field(name, one) for name, one in settings.prompt.fields.items())
    if fields:
        ordered = (*fields, *_SAMPLING, _ADAPTER, _SYSTEM, _PROMPT, _MESSAGES, _fields_input(settings))
    else:
        ordered = (_PROMPT, _SYSTEM, *_SAMPLING, _ADAPTER, _MESSAGES, _fields_input(settings))
    hidden: frozenset[str] = frozenset(settings.serve.form.hide)
    if not fields and hidden.issuperset(PROGRAMS):
        raise CogpressError(
            "serve.form.hide in model.yaml leaves nothing to ask with: describe prompt.fields, or show prompt."
        )
    return tuple(one for one in ordered if one.name not in hidden)


def _field(name: str, field: FormField) -> FormInput:
    low, high = field.minimum, field.maximum
    default = field.default
    kind = {"number": "float", "boolean": "bool"}.get(field.type, _TEXT)
    if default is None:
        default = ... if field.required else None
        kind = kind if field.required else f"Optional[{kind}]"
    elif field.type == "number":
        default = float(default)
    elif isinstance(default, list):
        joined = ", ".join(default)
        if any("," in one or one.lstrip().startswith("[") for one in default):
            raise CogpressError(
                f"prompt.fields.{name}: an item of its default has a comma or begins with a bracket, which a list in "
                "one line cannot hold. Leave it out of the default."
            )
        default = joined
    description = " ".join(field.description.split())
    if field.type == "list" and not description.endswith(LIST_HELP):
        description = f"{description.rstrip('.')}. {LIST_HELP}"
    if field.type == "number":
        return FormInput(name, kind, description, default, ge=_float(low), le=_float(high))
    if field.type in ("list", "choice", "boolean"):  # the prompt counts a list's items
        return FormInput(name, kind, description, default, choices=field.choices)
    return FormInput(name, kind, description, default, min_length=_whole(low), max_length=_whole(high))


def _float(bound: float | None) -> float | None:
    return None if bound is None else float(bound)


def _whole(bound: float | None) -> int | None:
    return None if bound is None else int(bound)


def completed(given: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A program's inputs with a value, which is not used, for each required field that they replace.

    Args:
        given: inputs; unchanged where none of `PROGRAMS` is among them.
        fields: the model's inputs, as `schema.fields` gives them.
    """
    if not any(given.get(name) for name in PROGRAMS):
        return dict(given)
    unused: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "string": lambda one: one["enum"][0] if one.get("enum") else "-" * one.get("minLength", 0),
        "number": lambda one: one.get("minimum", min(0, one.get("maximum", 0))),
        "integer": lambda one: one.get("minimum", min(0, one.get("maximum", 0))),
        "boolean": lambda _one: False,
    }
    needed = {
        name: unused[one["type"]](one)
        for name, one in fields.items()
        if one["required"] and name not in given and one.get("type") in unused
    }
    return {**needed, **given}


# --- in predict.py ----------------------------------------------------------------------------------------------------


def write(path: Path, settings: Config) -> bool:
    """Write the inputs into a runner's file; whether that changed it.

    Raises:
        CogpressError: the file lacks the marked lines.
    """
    text, current = _parts(path)
    made = written(settings)
    if made == current:
        return False
    with new_file(path) as file:
        file.write_text(text.replace(f"{BEGIN}\n{current}{END}\n", f"{BEGIN}\n{made}{END}\n"), encoding="utf-8")
    return True


def stale(path: Path, settings: Config) -> list[str]:
    """The lines between the marks that `model.yaml` would have otherwise; none if they agree. Raises as `write`."""
    current, made = _parts(path)[1].splitlines(), written(settings).splitlines()
    return [line.strip() for line in (*current, *made) if (line in current) != (line in made)] or (
        [] if current == made else ["the order of the inputs"]
    )


def marked(path: Path) -> bool:
    """Whether a file has the marked lines; a runner of one's own needs none."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines.count(BEGIN) == lines.count(END) == 1 and lines.index(BEGIN) < lines.index(END)


def _parts(path: Path) -> tuple[str, str]:
    """A file's text, and what stands between the marks."""
    if not marked(path):
        raise CogpressError(
            f"{path.name} needs the lines '{BEGIN.strip()}' and '{END.strip()}' around the inputs of run(), once each. "
            "Copy them from the repository's predict.py."
        )
    text = path.read_text(encoding="utf-8")
    return text, text.partition(f"{BEGIN}\n")[2].partition(f"{END}\n")[0]


def written(settings: Config) -> str:
    """The lines between the marks, formatted as ruff formats them."""
    return "".join(f"{line}\n" for one in inputs(settings) for line in _lines(one))


def _lines(one: FormInput) -> list[str]:
    arguments = [f"description={_literal(_in_one_kind_of_quotes(one.description))}"]
    if one.choices:
        arguments.append(f"choices=[{', '.join(map(_literal, one.choices))}]")
    if not one.required:
        arguments.append(f"default={_literal(one.default)}")
    for name in ("ge", "le", "min_length", "max_length"):
        if getattr(one, name) is not None:
            arguments.append(f"{name}={_literal(getattr(one, name))}")
    head = f"        {one.name}: {one.kind} = Input("
    whole = ", ".join(arguments)
    if len(f"{head}{whole}),") <= WIDTH:
        return [f"{head}{whole}),"]
    if len(whole) + 12 <= WIDTH:
        return [head, f"            {whole}", "        ),"]
    lines = [head]
    for argument in arguments:
        line = f"            {argument},"
        if len(line) > WIDTH and argument.startswith("choices="):
            lines += ["            choices=[", *(f"                {_literal(choice)}," for choice in one.choices)]
            lines.append("            ],")
        else:
            lines.append(line)
    return [*lines, "        ),"]


def _in_one_kind_of_quotes(text: str) -> str:
    return text.replace("'", "’") if '"' in text else text  # noqa: RUF001


def _literal(value: Any) -> str:
    """A value as Cog reads it: a text without escapes, which Cog would keep as they are written."""
    if not isinstance(value, str):
        return repr(value)
    if "\\" in value or not value.isprintable() or {"'", '"'} <= set(value):
        raise CogpressError(
            f"{value!r} cannot be written into predict.py: Cog reads no escapes. Write it without backslashes, line "
            "breaks, and one of the two kinds of quotes."
        )
    return f"'{value}'" if '"' in value else f'"{value}"'


# --- shown ------------------------------------------------------------------------------------------------------------


def table(settings: Config) -> Table:
    """The form as a table of 80 columns."""
    shown = Table(title="What users fill in", title_justify="left", width=80)
    shown.add_column("input", no_wrap=True)
    shown.add_column("value", max_width=20)
    shown.add_column("what it is", ratio=1)
    fields = settings.prompt.fields
    last = next(reversed(fields), None)
    for one in inputs(settings):
        value = fields[one.name].type if one.name in fields else _WORDS[one.kind]
        bounds = [bound for bound in (one.ge, one.le, one.min_length, one.max_length) if bound is not None]
        value += f", {' to '.join(f'{bound:.16g}' for bound in bounds)}" if len(bounds) == 2 else ""
        given = "required" if one.required else "optional" if one.default in (None, "") else f"default {one.default}"
        named = Text(one.name, style="bold" if one.name in fields else "")
        shown.add_row(named, f"{value}\n{given}", Text(one.description), end_section=one.name == last)
    return shown


_WORDS = {
    "str": "text",
    "Optional[str]": "text",
    "int": "whole number",
    "Optional[int]": "whole number",
    "float": "number",
    "bool": "yes or no",
    "Optional[bool]": "yes or no",
}
