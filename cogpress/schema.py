"""What a runner or a training function takes, as the OpenAPI document that Cog's runtime reads.

`cog build` writes `.cog/openapi_schema.json` into an image; without it the runtime checks no input, shows no
`/openapi.json` and refuses to stream. Here it is made from the same description of inputs that Cog's own SDK makes;
what each input means is `predict.py`'s and `train.py`'s.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

from cogpress import manifest
from cogpress.errors import CogpressError

PLACE = Path(".cog") / "openapi_schema.json"
"""Where the runtime looks, from its working directory."""


def openapi(root: Path, predict: str | None, train: str | None = None) -> dict[str, Any]:
    """The document for a project.

    Args:
        root: the project's folder.
        predict: the runner, such as `predict.py:Runner`.
        train: the training function, such as `train.py:train`.

    Raises:
        CogpressError: a reference names nothing, or the SDK refuses what it names.
    """
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    if predict is not None:
        info = _inspect(root, predict)
        schemas |= _schemas(info, "", "Prediction")
        paths["/predictions"] = {"post": _operation("Predict", "Prediction")}
        if streams(root, predict):
            paths["/predictions"]["post"]["x-cog-streaming"] = True
    if train is not None:
        info = _inspect(root, train)
        schemas |= _schemas(info, "Training", "Training")
        paths["/trainings"] = {"post": _operation("Train", "Training")}
    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.1.0"},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def write(root: Path, predict: str | None, train: str | None = None) -> Path:
    """Write the document where the runtime reads it, whole or not at all. Both modes of the runtime read this one."""
    path = root / PLACE
    path.parent.mkdir(exist_ok=True)
    manifest.write_json(path, openapi(root, predict, train))
    return path


def inputs(root: Path, reference: str) -> dict[str, dict[str, Any]]:
    """Each input's JSON schema by name, in the order of the form, choices written out as `enum`."""
    schemas = _schemas(_inspect(root, reference), "", "Prediction")
    found: dict[str, dict[str, Any]] = {}
    for name, field in schemas["Input"]["properties"].items():
        chosen = schemas.get(name, {}) if "allOf" in field else {}
        found[name] = {**chosen, **{key: value for key, value in field.items() if key != "allOf"}}
        found[name]["required"] = name in schemas["Input"].get("required", [])
    return found


def concurrency(root: Path, reference: str) -> int:
    """How many predictions a runner serves at once: its `@cog.concurrent(max=N)`, else 1.

    Only the image build reads the decorator; the runtime itself takes the number from its environment.
    """
    method = _run_method(root, reference)
    for decorator in method.decorator_list if method else []:
        if isinstance(decorator, ast.Call) and _name(decorator.func) == "concurrent":
            for keyword in decorator.keywords:
                if keyword.arg == "max" and isinstance(keyword.value, ast.Constant):
                    return int(keyword.value.value)  # type: ignore[arg-type]
    return 1


def streams(root: Path, reference: str) -> bool:
    """Whether a runner's method carries `@cog.streaming`, which leaves no mark at run time."""
    method = _run_method(root, reference)
    return method is not None and any(
        _name(item.func if isinstance(item, ast.Call) else item) == "streaming" for item in method.decorator_list
    )


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _run_method(root: Path, reference: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    file, _, name = reference.partition(":")
    for node in ast.parse((root / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.name == "run":
                    return item
    return None


def _inspect(root: Path, reference: str) -> Any:
    from cog import _inspector

    file, _, name = reference.partition(":")
    if not (root / file).is_file():
        raise CogpressError(f"{root / file}, which cog.yaml names, does not exist. Correct cog.yaml.")
    module = Path(file).stem
    # Another project's module of the same name must not answer for this one.
    loaded = sys.modules.pop(module, None)
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        return _inspector.create_predictor(module, name)
    except (ImportError, ValueError, TypeError) as error:
        raise CogpressError(f"{reference} can not be described: {error}") from None
    finally:
        sys.path.remove(str(root))
        sys.modules.pop(module, None)
        if loaded is not None:
            sys.modules[module] = loaded


def _schemas(info: Any, prefix: str, kind: str) -> dict[str, Any]:
    """The component schemas of one endpoint; `prefix` tells a training's from a prediction's."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    schemas: dict[str, Any] = {}
    for name, field in info.inputs.items():
        properties[name] = _property(name, field, schemas)
        if field.default is None and not _optional(field):
            required.append(name)
    input_schema: dict[str, Any] = {"title": f"{prefix}Input", "type": "object", "properties": properties}
    if required:
        input_schema["required"] = required
    output = dict(info.output.json_type())
    output["title"] = f"{prefix}Output"
    request = {
        "title": f"{kind}Request",
        "type": "object",
        "properties": {
            "id": {"title": "Id", "type": "string"},
            "input": {"$ref": f"#/components/schemas/{prefix}Input"},
            "webhook": {"title": "Webhook", "type": "string", "format": "uri"},
            "webhook_events_filter": {
                "title": "Webhook Events Filter",
                "type": "array",
                "items": {"type": "string", "enum": ["start", "output", "logs", "completed"]},
            },
        },
    }
    response = {
        "title": f"{kind}Response",
        "type": "object",
        "properties": {
            "id": {"title": "Id", "type": "string"},
            "status": {"title": "Status", "type": "string"},
            "input": {"$ref": f"#/components/schemas/{prefix}Input"},
            "output": {"$ref": f"#/components/schemas/{prefix}Output"},
            "error": {"title": "Error", "type": "string", "nullable": True},
            "logs": {"title": "Logs", "type": "string"},
            "metrics": {"title": "Metrics", "type": "object"},
        },
    }
    return {
        **schemas,
        f"{prefix}Input": input_schema,
        f"{prefix}Output": output,
        f"{kind}Request": request,
        f"{kind}Response": response,
    }


def _property(name: str, field: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    title = name.replace("_", " ").title()
    found: dict[str, Any] = {"x-order": field.order}
    if field.choices:
        schemas[name] = {
            "title": name,
            "description": "An enumeration.",
            "enum": list(field.choices),
            **field.type.json_type(),
        }
        found["allOf"] = [{"$ref": f"#/components/schemas/{name}"}]
    else:
        found |= {"title": title, **field.type.json_type()}
    if field.description:
        found["description"] = field.description
    if field.default is not None:
        found["default"] = field.type.json_encode(field.default)
    integer = found.get("type") == "integer"
    for key, value in (("minimum", field.ge), ("maximum", field.le)):
        if value is not None:
            found[key] = int(value) if integer else value
    for key, value in (("minLength", field.min_length), ("maxLength", field.max_length), ("pattern", field.regex)):
        if value is not None:
            found[key] = value
    if _optional(field):
        found["nullable"] = True
    if getattr(field, "deprecated", None):
        found["deprecated"] = True
    return found


def _optional(field: Any) -> bool:
    return "OPTIONAL" in field.type.repetition.name


def _operation(title: str, kind: str) -> dict[str, Any]:
    def content(schema: str) -> dict[str, Any]:
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}

    return {
        "summary": title,
        "operationId": title.lower(),
        "requestBody": {"content": content(f"{kind}Request")},
        "responses": {"200": {"description": "Successful Response", "content": content(f"{kind}Response")}},
    }
