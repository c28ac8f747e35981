"""Breaking changes of a schema and inputs generated from one; no server runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from cogpress import config
from cogpress.cog import schema
from cogpress.push import compatibility, fuzz, run, testcases
from cogpress.push.testcases import Outcome
from tests.standins.localreplicate import ROOT


def document(inputs: dict[str, Any], output: Any = None, required: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """A model's document, as Cog makes it."""
    choices = {name: one.pop("choices") for name, one in inputs.items() if "choices" in one}
    for name, listed in choices.items():
        inputs[name]["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
        more[name] = {"type": "string", "enum": listed}
    for order, one in enumerate(inputs.values()):
        one["x-order"] = order
    schemas = {"Input": {"properties": inputs, "required": list(required)}, "Output": output or {"type": "string"}}
    return {"components": {"schemas": {**schemas, **more}}}


TEXT = {"type": "string", "default": "a"}
COUNT = {"type": "integer", "default": 2, "minimum": 1, "maximum": 9}


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({"a": TEXT}, {}, "input a is removed"),
        ({"a": COUNT}, {"a": {**COUNT, "maximum": 8}}, "input a has the maximum 8 instead of 9"),
        ({"a": COUNT}, {"a": {**COUNT, "minimum": 2}}, "input a has the minimum 2 instead of 1"),
        ({"a": TEXT}, {"a": {**TEXT, "maxLength": 5}}, "input a has the maxLength 5 instead of none"),
        ({"a": TEXT}, {"a": {**TEXT, "pattern": "x"}}, "input a must match x"),
        ({"a": TEXT}, {"a": {**TEXT, "default": "b"}}, "input a has the default 'b' instead of 'a'"),
        ({"a": COUNT}, {"a": TEXT}, "input a takes string instead of integer"),
        ({"a": {"type": "number"}}, {"a": {"type": "integer"}}, "input a takes integer instead of number"),
        ({"a": {"type": "string", "format": "uri"}}, {"a": TEXT}, "takes string instead of string (uri)"),
        ({"a": {"choices": ["x", "y"]}}, {"a": {"choices": ["x"]}}, "input a no longer takes y"),
        ({"a": {"type": "string"}}, {"a": {"choices": ["x"]}}, "input a takes only x"),
        ({"a": {**TEXT, "nullable": True}}, {"a": TEXT}, "input a can no longer be null"),
    ],
)
def test_what_breaks_is_named(before: Any, now: Any, said: str) -> None:
    fresh = json.loads(json.dumps([before, now]))
    found = compatibility.breaking(document(fresh[0]), document(fresh[1]))
    assert [line for line in found if said in line], found


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"a": TEXT}, {"a": TEXT, "b": TEXT}),
        ({"a": {**COUNT, "maximum": 9223372036854776000}}, {"a": {**COUNT, "maximum": 2**63 - 1}}),
        ({"a": COUNT}, {"a": {**COUNT, "maximum": 10, "minimum": 0}}),
        ({"a": COUNT}, {"a": {"type": "integer", "default": 2}}),
        ({"a": {"type": "integer"}}, {"a": {"type": "number"}}),
        ({"a": {"choices": ["x"]}}, {"a": {"choices": ["y", "x"]}}),
        ({"a": {"choices": ["x"]}}, {"a": {"type": "string"}}),
        ({"a": TEXT}, {"a": {**TEXT, "nullable": True, "description": "new"}}),
    ],
)
def test_what_widens_breaks_nothing(before: Any, now: Any) -> None:
    fresh = json.loads(json.dumps([before, now]))
    assert compatibility.breaking(document(fresh[0]), document(fresh[1])) == []


def test_what_must_be_given() -> None:
    optional, required = document({"a": {"type": "string"}}), document({"a": {"type": "string"}}, required=("a",))
    assert compatibility.breaking(optional, required) == ["input a is required now"]
    assert compatibility.breaking(required, optional) == []
    assert compatibility.breaking(document({}), required) == ["input a is new and required"]


def test_another_output_is_named() -> None:
    texts = {"type": "array", "items": {"type": "string"}, "x-cog-array-type": "iterator"}
    [found] = compatibility.breaking(document({}), document({}, texts))
    assert found == "the output is an iterator of string instead of string"
    first = document({}, {"$ref": "#/components/schemas/Made"}, Made={"type": "object", "properties": {"a": TEXT}})
    other = document({}, {"$ref": "#/components/schemas/Made"}, Made={"type": "object", "properties": {"a": COUNT}})
    [found] = compatibility.breaking(first, other)
    assert "object (a: integer) instead of object (a: string)" in found
    streams = {**document({}), "paths": {"/predictions": {"post": {"x-cog-streaming": True}}}}
    assert compatibility.breaking(streams, document({})) == ["the output no longer streams"]


def test_the_kits_own_runner_breaks_nothing_of_itself() -> None:
    made = schema.openapi(ROOT, "predict.py:Runner")
    assert compatibility.breaking(made, json.loads(json.dumps(made))) == []


def test_made_up_inputs_are_allowed_by_the_schema_and_the_same_for_a_seed() -> None:
    import jsonschema

    made = schema.openapi(ROOT, "predict.py:Runner")
    found = fuzz.inputs(made, config.Fuzz(rounds=50, leave_out=("tools",)))
    validator = jsonschema.Draft7Validator({**made, "$ref": "#/components/schemas/Input"})
    assert [error.message for given in found for error in validator.iter_errors(given)] == []
    assert found == fuzz.inputs(made, config.Fuzz(rounds=50, leave_out=("tools",)))
    assert found != fuzz.inputs(made, config.Fuzz(rounds=50, leave_out=("tools",), seed=1))
    names = {name for given in found for name in given}
    assert names == set(schema.fields(made)) - {"tools"}
    assert {given["max_tokens"] for given in found} == {32}
    assert {given["max_tokens"] for given in fuzz.inputs(made, config.Fuzz(fixed={"max_tokens": 4}))} == {4}
    temperatures = {given["temperature"] for given in found if "temperature" in given}
    assert {0.0, 5.0} <= temperatures  # the bounds are tried


def test_files_and_secrets_are_not_made_up() -> None:
    file = {"type": "string", "format": "uri"}
    secret = {"type": "string", "format": "password", "x-cog-secret": True}
    listed = {"type": "array", "items": {"type": "string"}, "minLength": 0}
    inputs = {"file": file, "secret": secret, "list": listed, "flag": {"type": "boolean"}}
    found = fuzz.inputs(document(inputs), config.Fuzz(rounds=30))
    assert {name for given in found for name in given} == {"list", "flag"}


@pytest.mark.parametrize(
    ("made", "passes"),
    [
        ({"status": "succeeded"}, True),
        ({"status": "failed", "error": "Prediction failed: CogpressError: Give one."}, True),
        ({"status": "failed", "error": "messages must be a list."}, True),
        ({"status": "failed", "error": "ValueError: no"}, True),
        ({"status": "failed", "error": "TypeError: 'NoneType' object is not subscriptable"}, False),
        ({"status": "failed", "error": "torch.OutOfMemoryError: CUDA out of memory"}, False),
        ({"status": "failed", "error": ""}, False),
        ({"status": "failed", "error": "it did not end within 1 s", "timed_out": True}, False),
        ({"status": "canceled"}, False),
    ],
)
def test_a_refusal_is_told_from_a_fault(made: dict[str, Any], passes: bool) -> None:
    assert (fuzz._fault(made) is None) is passes


@pytest.mark.parametrize(
    "case",
    [
        {"input": {}, "cancels": True, "exact": "x"},
        {"input": {}, "error": "x", "contains": "y"},
        {"input": {}, "error": "x", "streams": True},
        {"input": {}, "contain": "y"},
        {"input": {}, "seconds": 0},
    ],
)
def test_a_test_that_cannot_be_met_is_refused(case: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config.Case.model_validate(case)


def test_the_page_names_every_expectation_and_every_step() -> None:
    """Its options are in docs/configuration.md, which is generated."""
    page = (ROOT / "docs" / "push.md").read_text()
    assert not [name for name in config.Case.model_fields if name != "name" and f"`{name}`" not in page]
    steps = (
        run.PREFLIGHT,
        run.MODELS,
        run.BESIDE,
        run.TEST_PUSH,
        run.PUSHED,
        run.TESTS,
        run.SAME,
        run.FUZZ,
        run.PARITY,
    )
    for step in (*steps, run.TRAINING, run.REAL_PUSH, run.DEPLOYMENT):
        assert f"| {step} |" in page


def test_outcomes_fit_a_terminal() -> None:
    from io import StringIO

    from rich.console import Console

    file = StringIO()
    outcomes = [Outcome("a name that says what it is for", False, "long " * 60, 1.5), Outcome("b", True, "[bold]x", 0)]
    Console(file=file, width=80).print(testcases.table(outcomes))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    assert "[bold]x" in file.getvalue()
