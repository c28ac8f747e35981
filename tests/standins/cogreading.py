"""What the stand-in for `cog` refuses of a project, by rules that the recorded verdicts of the real one bear out.

It finds a part of what Cog refuses, and refuses nothing that Cog takes (tests/preflight/test_corpus.py).
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import yaml

from cogpress.cog import reading

ITERATORS = ("Iterator", "AsyncIterator", "ConcatenateIterator", "AsyncConcatenateIterator")


def refusal(root: Path, mode: str) -> str:
    """Why Cog refuses the project when it is asked to `run` or to `train`; empty where no rule here says so."""
    try:
        content = next(yaml.safe_load_all((root / "cog.yaml").read_text(encoding="utf-8-sig")), None)
    except yaml.YAMLError as error:
        return f"failed to parse cog.yaml: invalid YAML: {error}"
    if not isinstance(content, dict):
        return ""
    build = content.get("build")
    if isinstance(build, dict):
        if build.get("gpu") not in (None, True, False):
            return "failed to parse cog.yaml: cannot construct into bool"
        if "python_version" not in build:
            return 'schema error in "build": python_version is required'
        if str(build["python_version"]) in ("2.7", "3.6", "3.7", "3.8", "3.9"):
            return f'invalid build.python_version "{build["python_version"]}": minimum supported Python version is 3.10'
        if {"python_packages", "python_requirements"} <= build.keys():
            return "invalid build: only one of python_packages or python_requirements can be set, not both"
    if {"run", "predict"} <= content.keys():
        return "invalid run: only one of run or predict can be set"
    if not {"run", "predict", "train"} & content.keys():
        return "no predict or train reference found in cog.yaml"
    keys = ("train",) if mode == "train" else ("run", "predict")
    named = next((str(content[key]) for key in keys if content.get(key)), None)
    return _of_source(root, named, reading.TRAINING if mode == "train" else reading.METHODS) if named else ""


def _of_source(root: Path, named: str, methods: tuple[str, ...]) -> str:
    file, _, name = named.partition(":")
    if not (root / file).is_file():
        return f"{file}: no such file"
    try:
        target = reading.find(root, named.removeprefix("./"), methods)
    except (SyntaxError, UnicodeDecodeError):
        return ""  # what Cog's parser makes of it is its own
    method = target.method
    if target.owner is None and method is None:
        return f"{name}: not found in {file}" if methods == reading.METHODS else ""
    if method is None:
        return "" if target.owner is not None and target.owner.bases[1:] else f"{name} must define run() or predict()"
    if method.returns is None:
        return name if target.owner is None else method.name
    if isinstance(method.returns, ast.Constant) and method.returns.value is None:
        return "cannot resolve type 'None'"
    for annotation in [one.annotation for one, _ in target.inputs]:
        kind = ast.unparse(annotation.value) if isinstance(annotation, ast.Subscript) else ""
        if kind in ("Literal", "typing.Literal", "tuple"):
            return f"unsupported type: {kind.rpartition('.')[2]}[...] is not a supported input type"
    for argument, default in target.inputs:
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "cog.Input":
            return f"parameter '{argument.arg}': default `{ast.unparse(default)}` cannot be statically resolved"
    decorators = [ast.unparse(one) for one in method.decorator_list]
    shown = ast.unparse(method.returns).strip("'\"")
    if any(one.partition("(")[0] in ("streaming", "cog.streaming") for one in decorators) and not any(
        f"{one}[" in shown for one in ITERATORS
    ):
        return "@streaming requires Iterator[...] or another iterator as return type"
    return next(filter(None, map(_of_concurrency, method.decorator_list)), "")


def _of_concurrency(decorator: Any) -> str:
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) not in ("concurrent", "cog.concurrent"):
        return ""
    for keyword in decorator.keywords:
        value = getattr(keyword.value, "value", None)
        if keyword.arg == "max" and type(value) is not int:
            return "@concurrent max must be an integer literal"
        if keyword.arg == "max" and isinstance(value, int) and value < 1:
            return "@concurrent max must be at least 1"
    return ""
