"""The inputs of a runner or training function as the OpenAPI document that Cog's runtime reads.

`cog build` writes it into an image as `.cog/openapi_schema.json`; without it the runtime checks no input, serves no
`/openapi.json` and refuses to stream. This module makes the same document from the SDK's own description of the inputs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from cogpress.cog import reading
from cogpress.errors import CogpressError
from cogpress.files import read_json, write_json

PLACE = Path(".cog") / "openapi_schema.json"
"""From the runtime's working directory; read once, at the end of the runner's setup."""


@dataclass(frozen=True)
class _Endpoint:
    """Cog's names for an endpoint and its parts: a prediction's or a training's."""

    verb: str
    noun: str
    prefix: str

    @property
    def route(self) -> str:
        return f"/{self.noun}s"


_PREDICTIONS = _Endpoint("predict", "prediction", "")
_TRAININGS = _Endpoint("train", "training", "Training")


def openapi(root: Path, predict: str | None, train: str | None = None) -> dict[str, Any]:
    """The document for a project.

    Args:
        root: the project's folder.
        predict: the runner, such as `predict.py:Runner`.
        train: the training function, such as `train.py:train`.

    Raises:
        CogpressError: a reference names nothing, the SDK refuses what it names, or an input has different choices in
            training and prediction, which the document cannot hold.
    """
    import cog

    paths: dict[str, Any] = {"/": _get("Root", "root__get")}
    paths["/health-check"] = _get("Healthcheck", "healthcheck_health_check_get")
    schemas: dict[str, Any] = {}
    for endpoint, reference in ((_PREDICTIONS, predict), (_TRAININGS, train)):
        if reference is None:
            continue
        for name, made in _schemas(_inspect(root, reference), endpoint).items():
            if schemas.setdefault(name, made) != made:
                raise CogpressError(
                    f"The input {name} of {reference} has other choices than that of {predict}, but Cog's document "
                    "holds one list per name. Give both the same choices, or rename one."
                )
        operation = _operation(endpoint)
        if endpoint is _PREDICTIONS and streams(root, reference):
            operation["x-cog-streaming"] = True
        paths[endpoint.route] = {"post": operation}
        paths[f"{endpoint.route}/{{{endpoint.noun}_id}}/cancel"] = {"post": _cancel(endpoint)}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": cog.__version__},
        "paths": paths,
        "components": {"schemas": schemas | _COMMON},
    }


def write(root: Path, predict: str | None, train: str | None = None) -> Path:
    """Write the document where the runtime reads it, atomically.

    One document serves both modes of the runtime, so that two servers in one folder never disagree about it.
    """
    path = root / PLACE
    document = openapi(root, predict, train)
    try:
        if read_json(path) == document:
            return path  # the folder may be read-only, as in an image
    except (FileNotFoundError, ValueError):
        pass
    path.parent.mkdir(exist_ok=True)
    write_json(path, document)
    return path


def inputs(root: Path, reference: str) -> dict[str, dict[str, Any]]:
    """A runner's inputs; see `fields`."""
    return _fields(_schemas(_inspect(root, reference), _PREDICTIONS))


def fields(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each prediction input's JSON schema by name, in the form's order.

    Choices are in `enum`, and `required` says whether the input must be given.
    """
    return _fields(document.get("components", {}).get("schemas", {}))


def concurrency(root: Path, reference: str) -> int:
    """A runner's concurrent predictions: its `@cog.concurrent(max=N)`, else 1.

    Only the image build reads the decorator; the runtime takes the number from its environment.
    """
    return reading.concurrency(reading.find(root, reference).method)


def streams(root: Path, reference: str) -> bool:
    """Whether a runner's method carries `@cog.streaming`, which leaves no trace at run time."""
    return reading.decorator(reading.find(root, reference).method, "streaming") is not None


@dataclass(frozen=True)
class _Described:
    """The SDK's description of a runner or a function."""

    inputs: dict[str, Any]
    output: dict[str, Any]
    written: dict[str, Any]
    """Each input's `Input(...)` as written: the SDK's description omits some of it."""
    defaulted: set[str]
    """The inputs that name a default, None too."""
    shown: dict[str, str]
    """The descriptions that Cog shows otherwise than they are meant."""


def _inspect(root: Path, reference: str) -> _Described:
    from cog import _inspector

    file, _, name = reference.partition(":")
    if not file.endswith(".py") or not name:
        raise CogpressError(f"cog.yaml names {reference!r}. Write file.py:Name, such as predict.py:Runner.")
    if not (root / file).is_file():
        raise CogpressError(f"{root / file}, which cog.yaml names, does not exist. Correct cog.yaml.")
    module = ".".join(Path(file).with_suffix("").parts)
    # Another project's module of the same name must not be taken for this one.
    loaded = sys.modules.pop(module, None)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    # A file that changes again within the second, to the same length, would be taken for its compiled one.
    compiles, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        info = _inspector.create_predictor(module, name)
        found = getattr(sys.modules[module], name)
        function = found if inspect.isfunction(found) else _inspector._selected_predict_method(found, reference)[1]
        target = reading.find(root, reference)
    except (ImportError, SyntaxError, ValueError, TypeError) as error:
        raise CogpressError(f"Could not describe {reference}: {error}") from error
    finally:
        sys.dont_write_bytecode = compiles
        sys.path.remove(str(root))
        sys.modules.pop(module, None)
        if loaded is not None:
            sys.modules[module] = loaded
    parameters = inspect.signature(function).parameters.items()
    written = {name: parameter.default for name, parameter in parameters}
    for loss in reading.losses(target):
        if not loss.shown:  # the document would not be the one in the image
            raise CogpressError(f"{target.file}, line {loss.line}: {loss.what}. {loss.fix}.")
    output = info.output.json_type() | _dictionary(target.method.returns if target.method else None)
    return _Described(info.inputs, output, written, reading.defaulted(target), reading.descriptions(target))


def _dictionary(node: ast.expr | None) -> dict[str, Any]:
    """What the SDK's description of an output leaves out: the type of a dictionary's values."""
    if not isinstance(node, ast.Subscript) or reading.last(node) not in ("dict", "Dict", "list", "List"):
        kind = _JSON.get(reading.last(node)) if node is not None else None
        return {"type": kind} if kind else {}
    inner = _dictionary(node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice)
    if reading.last(node) in ("list", "List"):
        return {"type": "array", "items": inner} if inner else {}
    return {"type": "object", "additionalProperties": inner} if inner else {}


_JSON = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}


def _schemas(described: _Described, endpoint: _Endpoint) -> dict[str, Any]:
    """The component schemas of one endpoint."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    schemas: dict[str, Any] = {}
    for name, field in described.inputs.items():
        given = name in described.defaulted
        properties[name] = _property(name, field, described.written.get(name), schemas, given=given)
        if name in described.shown:
            properties[name]["description"] = described.shown[name]
        if field.default is None and not _optional(field, given=given):
            required.append(name)
    input_name, output_name = f"{endpoint.prefix}Input", f"{endpoint.prefix}Output"
    input_schema: dict[str, Any] = {"title": input_name, "type": "object", "properties": properties}
    if required:
        input_schema["required"] = required
    shared = {"id": _text("Id"), "input": _reference(input_name)}
    response = {
        **shared,
        "output": _reference(output_name),
        "version": _text("Version"),
        **{name: _text(_title(name), format="date-time") for name in ("created_at", "started_at", "completed_at")},
        **{name: _text(_title(name)) for name in ("status", "error", "logs")},
        "metrics": {"title": "Metrics", "type": "object"},
    }
    kind = endpoint.noun.title()
    return {
        input_name: input_schema,
        output_name: described.output,
        **schemas,
        f"{kind}Request": {"title": f"{kind}Request", "type": "object", "properties": shared},
        f"{kind}Response": {"title": f"{kind}Response", "type": "object", "properties": response},
    }


def _property(name: str, field: Any, written: Any, schemas: dict[str, Any], *, given: bool) -> dict[str, Any]:
    """One input's schema; its choices are added to `schemas`."""
    found: dict[str, Any] = {"x-order": field.order}
    if field.choices:
        choices = {"title": name, "description": "An enumeration.", "enum": list(field.choices)}
        schemas[name] = choices | field.type.json_type()
        found["allOf"] = [_reference(name)]
    else:
        found |= {"title": _title(name), **field.type.json_type()}
    optional = _optional(field, given=given)
    if field.default is not None or (optional and given):
        found["default"] = None if field.default is None else field.type.json_encode(field.default)
    if optional:
        found["nullable"] = True
    if field.deprecated:
        found["deprecated"] = True
    keywords = {
        "description": field.description,
        # As written, integers as integers: the SDK's description holds every bound as a float.
        "minimum": _bound(getattr(written, "ge", None)),
        "maximum": _bound(getattr(written, "le", None)),
        "minLength": field.min_length,
        "maxLength": field.max_length,
        "pattern": field.regex,
        "x-cog-accept": getattr(written, "accept", None),
    }
    return found | {key: value for key, value in keywords.items() if value is not None}


def _bound(written: float | None) -> float | None:
    """A bound as `cog build` writes it: the shortest digits of a float64, which rounds integers from 2**53 on."""
    return int(Decimal(repr(float(written)))) if isinstance(written, int) else written


def _fields(schemas: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    made = schemas.get("Input", {})
    for name, field in sorted(made.get("properties", {}).items(), key=lambda item: item[1].get("x-order", 0)):
        chosen = schemas.get(name, {}) if "allOf" in field else {}
        found[name] = {**chosen, **{key: value for key, value in field.items() if key != "allOf"}}
        found[name]["required"] = name in made.get("required", [])
    return found


def _optional(field: Any, *, given: bool) -> bool:
    """Whether an input may be left out without a value; to Cog, a secret with the default None is optional too."""
    secret = given and field.type.json_type().get("x-cog-secret", False)
    return bool("OPTIONAL" in field.type.repetition.name or (secret and field.default is None))


def _title(name: str) -> str:
    """Inner capitals stay: topK becomes TopK."""
    return " ".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _text(title: str, **more: str) -> dict[str, Any]:
    return {"title": title, "type": "string", **more}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _get(summary: str, identifier: str) -> dict[str, Any]:
    responses = {"200": _answer("Successful Response", {})}
    return {"get": {"summary": summary, "operationId": identifier, "responses": responses}}


def _operation(endpoint: _Endpoint) -> dict[str, Any]:
    kind = endpoint.noun.title()
    return {
        "summary": endpoint.verb.title(),
        "description": f"Run a single {endpoint.noun} on the model",
        "operationId": f"{endpoint.verb}_{endpoint.noun}s_post",
        "requestBody": {"content": {"application/json": {"schema": _reference(f"{kind}Request")}}},
        "responses": {
            "200": _answer("Successful Response", _reference(f"{kind}Response")),
            "422": _answer("Validation Error", _reference("HTTPValidationError")),
        },
    }


def _cancel(endpoint: _Endpoint) -> dict[str, Any]:
    identifier = f"{endpoint.noun}_id"
    return {
        "summary": "Cancel",
        "operationId": f"cancel_{endpoint.noun}s__{identifier}__cancel_post",
        "parameters": [{"required": True, "schema": _text(_title(identifier)), "name": identifier, "in": "path"}],
        "responses": {
            "200": _answer("Successful Response", {}),
            "422": _answer("Validation Error", _reference("HTTPValidationError")),
        },
    }


_COMMON: dict[str, Any] = {
    "Status": {
        "title": "Status",
        "description": "An enumeration.",
        "enum": ["starting", "processing", "succeeded", "canceled", "failed"],
        "type": "string",
    },
    "HTTPValidationError": {
        "title": "HTTPValidationError",
        "type": "object",
        "properties": {"detail": {"title": "Detail", "type": "array", "items": _reference("ValidationError")}},
    },
    "ValidationError": {
        "title": "ValidationError",
        "type": "object",
        "required": ["loc", "msg", "type"],
        "properties": {
            "loc": {
                "title": "Location",
                "type": "array",
                "items": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
            },
            "msg": _text("Message"),
            "type": _text("Error Type"),
        },
    },
}
"""In every document of Cog's."""
