"""What the stand-in for `cog` refuses of a project, by rules that the recorded verdicts of the real one bear out.

It finds most of what Cog refuses, and refuses nothing that Cog takes (tests/preflight/test_corpus.py).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cogpress.cog import reading

ITERATORS = ("Iterator", "AsyncIterator", "ConcatenateIterator", "AsyncConcatenateIterator")
CUDAS = ("11.0", "11.1", "11.2", "11.3", "11.4", "11.5", "11.6", "11.7", "11.8")
CUDAS += ("12.0", "12.1", "12.2", "12.3", "12.4", "12.5", "12.6", "12.8", "12.9", "13.0", "13.1", "13.2")
NEW_TORCH = "torch==2.13.0"
"""Cog knows of no CUDA that goes with it."""

RESERVED = re.compile(
    r"(PATH|LD_LIBRARY_PATH|LIBRARY_PATH|PYTHONPATH|PYTHONUNBUFFERED|VIRTUAL_ENV|HF_ENDPOINT|HF_HUB_ENABLE_HF_TRANSFER|"
    r"(R8|REPLICATE|CUDA|NVIDIA|NV|PGET|KUBERNETES)_.*)"
)
TYPED = {"str": str, "int": int, "float": (int, float), "bool": bool}


def refusal(root: Path, mode: str, file: str = "cog.yaml") -> str:
    """Why Cog refuses the project when it is asked to `run` or to `train`; empty where no rule here says so."""
    try:
        text = (root / file).read_text(encoding="utf-8-sig")
        content = next(yaml.safe_load_all(text), None)
    except yaml.YAMLError as error:
        return f"failed to parse cog.yaml: invalid YAML: {error}"
    if not isinstance(content, dict):
        return ""
    if said := next(filter(None, [*_twice(yaml.compose_all(text)), *_of_config(root, content)]), ""):
        return said
    keys = ("train",) if mode == "train" else ("run", "predict")
    named = next((str(content[key]) for key in keys if content.get(key)), None)
    found = _of_source(root, named, mode == "train") if named else ""
    return found or (_of_both(root, content) if mode == "train" and named else "")


def build_refusal(root: Path) -> str:
    """Why Cog's build fails where its quick look at the project does not; empty where no rule here says so."""
    content = next(yaml.safe_load_all((root / "cog.yaml").read_text(encoding="utf-8-sig")), None) or {}
    build = content.get("build")
    if not isinstance(build, dict):
        return "image build failed: Failed to build Docker image: failed to solve"
    for item in build.get("run") or []:
        command = str((item.get("command") if isinstance(item, dict) else item) or "").strip()
        if "\n" in command:
            return f"image build failed: Failed to generate Dockerfile: One of the commands has a new line: {command}"
    named = root / str(build.get("python_requirements") or "")
    for line in named.read_text(encoding="utf-8").splitlines() if named.is_file() else []:
        if re.match(r"\.?/\S+\s+--hash", line):
            return f"image build failed: local package artifact requirements do not support inline options: {line}"
        if re.search(r"@\s*file:", line):
            return f"image build failed: local file URL requirements are not supported: {line}"
        if re.search(r"@\s*\.?/", line):
            return f"image build failed: local direct reference requirements (`name @ path`) are not supported: {line}"
        if re.match(r"(--find-links|-f)[ =](?!\w+://)", line):
            return f'image build failed: local requirements option "--find-links" is not supported: {line}'
    concurrency = content.get("concurrency")
    most = concurrency.get("max") if isinstance(concurrency, dict) else None
    reference = content.get("run") or content.get("predict")
    if isinstance(most, int) and most > 1 and reference:
        method = reading.find(root, str(reference).removeprefix("./")).method
        if not isinstance(method, ast.AsyncFunctionDef):
            return "image build failed: concurrency.max > 1 requires an async run() or predict() method"
    if reference and (said := _of_python(root, str(reference), str(build.get("python_version")))):
        return f"image build failed: {said}"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# cog.yaml
# ---------------------------------------------------------------------------------------------------------------------


def _twice(documents: Any) -> Iterator[str]:
    waiting = [next(documents, None)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                if key.value in names:
                    yield f'failed to parse cog.yaml: invalid YAML: mapping key "{key.value}" already defined'
                names.add(key.value)
                waiting.append(value)


def _of_config(root: Path, content: dict[str, Any]) -> Iterator[str]:
    build = content.get("build")
    if isinstance(build, dict):
        yield from _of_build(root, build)
    if {"run", "predict"} <= content.keys():
        yield "invalid run: only one of run or predict can be set"
    if not {"run", "predict", "train"} & content.keys():
        yield "no predict or train reference found in cog.yaml"
    listed = content.get("environment")
    if isinstance(listed, dict):
        yield "failed to parse cog.yaml: invalid YAML: cannot construct !!map into []string"
    for number, entry in enumerate(listed or []):
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*=", str(entry)):
            yield f'schema error in "environment.{number}": Does not match pattern'
        if RESERVED.fullmatch(name := str(entry).partition("=")[0]):
            yield f'invalid environment: environment variable "{name}" is not allowed: reserved for internal use'
    model = str(content.get("model") or "")
    if ":" in model.rpartition("/")[2] or "@" in model:
        yield f'invalid model "{model}": must be a bare repository — tags and digests are not allowed'
    if content.get("weights") and not model:
        yield "invalid model: weights require 'model' in cog.yaml — rename 'image' to 'model'"
    if content.get("weights") and not (root / "weights.lock").is_file():
        yield "weights.lock is out of sync with cog.yaml. Run 'cog weights import' to update."
    concurrency = content.get("concurrency")
    if isinstance(concurrency, dict):
        if "max" not in concurrency:
            yield 'schema error in "concurrency": max is required'
        elif isinstance(concurrency["max"], int) and concurrency["max"] < 1:
            yield f'invalid concurrency.max "{concurrency["max"]}": must be at least 1'


def _of_build(root: Path, build: dict[str, Any]) -> Iterator[str]:
    gpu, cuda = build.get("gpu"), str(build.get("cuda") or "")
    if gpu not in (None, True, False):
        yield "failed to parse cog.yaml: cannot construct into bool"
    if "python_version" not in build:
        yield 'schema error in "build": python_version is required'
    if str(build.get("python_version")) in ("2.7", "3.6", "3.7", "3.8", "3.9"):
        yield f'invalid build.python_version "{build["python_version"]}": minimum supported Python version is 3.10'
    if {"python_packages", "python_requirements"} <= build.keys():
        yield "invalid build: only one of python_packages or python_requirements can be set, not both"
    if gpu is True and cuda and ".".join(cuda.split(".")[:2]) not in CUDAS:
        yield f"CUDA {cuda} is not supported by Cog"
    if gpu is True and cuda.startswith("13.") and str(build.get("cudnn") or "9") != "9":
        yield f"CUDA {cuda} is incompatible with CuDNN {build['cudnn']}"
    named = root / str(build.get("python_requirements") or "")
    text = named.read_text(encoding="utf-8") if named.is_file() else ""
    if gpu is True and not cuda and NEW_TORCH in text:
        yield f"cog doesn't know what CUDA version is compatible with {NEW_TORCH}."
    sdk = re.match(r"(\d+)\.(\d+)\.\d+$", str(build.get("sdk_version") or ""))
    if sdk and (int(sdk[1]), int(sdk[2])) < (0, 17):
        yield f"SDK version {sdk[0]} is not supported by static schema generation; use 0.17.0 or newer"
    for number, item in enumerate(build.get("run") or []):
        if isinstance(item, int | float):
            yield "failed to parse cog.yaml: invalid YAML: unexpected type int for runItemFile"
        if isinstance(item, dict):
            if not item.get("command"):
                yield f'schema error in "build.run.{number}": command is required'
            for mount in item.get("mounts") or []:
                if isinstance(mount, dict) and "id" not in mount:
                    yield f'schema error in "build.run.{number}.mounts.0": id is required'


# ---------------------------------------------------------------------------------------------------------------------
# The runner and the training
# ---------------------------------------------------------------------------------------------------------------------


def _target(root: Path, named: str, training: bool) -> reading.Target | None:
    try:
        return reading.find(root, named.removeprefix("./"), reading.TRAINING if training else reading.METHODS)
    except (SyntaxError, UnicodeDecodeError):
        return None  # what Cog's parser makes of it is its own


def _of_source(root: Path, named: str, training: bool) -> str:
    file, _, name = named.partition(":")
    if not (root / file).is_file():
        return f"{file}: no such file"
    target = _target(root, named, training)
    if target is None:
        return ""
    method = target.method
    if target.owner is None and method is None:
        functions = {node.name for node in target.module.body if isinstance(node, reading.Method)}
        return "" if training and "train" in functions | reading._bound(target.module) else f"{name}: not in {file}"
    if method is None:
        return "" if target.owner is not None and target.owner.bases[1:] else f"{name} must define run() or predict()"
    if method.returns is None:
        return name if target.owner is None else method.name
    rest = [argument for argument in (method.args.vararg, method.args.kwarg) if argument and argument.annotation]
    if rest:
        return "typed_parameter has no identifier"
    found = [*_of_output(target, method.returns), *_of_inputs(target), *map(_of_concurrency, method.decorator_list)]
    decorators = [ast.unparse(one) for one in method.decorator_list]
    shown = ast.unparse(method.returns).strip("'\"")
    if any(one.partition("(")[0] in ("streaming", "cog.streaming") for one in decorators) and not any(
        f"{one}[" in shown for one in ITERATORS
    ):
        found.append("@streaming requires Iterator[...] or another iterator as return type")
    return next(filter(None, found), "")


def _of_python(root: Path, named: str | None, python: str) -> str:
    target = _target(root, named, False) if named and (root / named.partition(":")[0]).is_file() else None
    many = target is not None and reading.concurrency(target.method) > 1
    return "concurrency requires Python 3.11 or higher" if many and python == "3.10" else ""


def _outside(target: reading.Target, name: str) -> str | None:
    """The module from which a name is imported."""
    for node in target.module.body:
        if isinstance(node, ast.ImportFrom) and any((one.asname or one.name) == name for one in node.names):
            return node.module
    return None


def _class(target: reading.Target, name: str) -> ast.ClassDef | None:
    return next((one for one in target.module.body if isinstance(one, ast.ClassDef) and one.name == name), None)


def _external(name: str, module: str | None) -> str:
    return f"cannot resolve type '{name}' (imported from '{module}') - external types cannot be statically analyzed"


def _of_output(target: reading.Target, node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Constant) and node.value is None:
        yield "cannot resolve type 'None'"
    union = isinstance(node, ast.BinOp) or (isinstance(node, ast.Subscript) and reading.last(node.value) == "Union")
    if union and not any(isinstance(one, ast.Constant) and one.value is None for one in ast.walk(node)):
        yield "unsupported type: union types are not supported as output"
    name = reading.last(node)
    if isinstance(node, ast.Subscript):
        if name in ("tuple", "Tuple", "Generator"):
            yield f"unsupported type: {name}[...] is not a supported output type"
        if name in ITERATORS[2:] and ast.unparse(node.slice) not in ("str", "'str'"):
            yield f"ConcatenateIterator element type must be str, got {ast.unparse(node.slice)}"
    elif isinstance(node, ast.Name | ast.Attribute):
        made, module = _class(target, name), _outside(target, name)
        bases = {reading.last(base) for base in made.bases} if made else set[str]()
        if name in ITERATORS:
            yield _external(name, module)
        elif made and (not bases or "Enum" in bases):
            yield f"cannot resolve type '{name}' - it is not a primitive type and no BaseModel definition was found"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("cog", "typing", "pathlib"):
            yield _external(name, ast.unparse(node.value))
        elif isinstance(node, ast.Name) and not made and name not in _known(target):
            yield f"cannot resolve type '{name}' - it is not a primitive type and no BaseModel definition was found"


def _known(target: reading.Target) -> set[str]:
    return {"str", "int", "float", "bool", "dict", "list", "object", "bytes"} | reading._bound(target.module)


def _of_inputs(target: reading.Target) -> Iterator[str]:
    for argument, default in target.inputs:
        if argument.annotation is not None:
            yield from _of_type(target, argument.annotation)
        call = default if isinstance(default, ast.Call) else None
        if call is not None and ast.unparse(call.func) == "cog.Input":
            yield f"parameter '{argument.arg}': default `{ast.unparse(call)}` cannot be statically resolved"
        elif call is not None:
            yield from _of_input(target, argument, {word.arg: word.value for word in call.keywords if word.arg})
        elif isinstance(default, ast.BinOp):
            yield f"parameter '{argument.arg}': default `{ast.unparse(default)}` cannot be statically resolved"


def _of_type(target: reading.Target, node: ast.expr) -> Iterator[str]:
    kind, name = ast.unparse(node.value) if isinstance(node, ast.Subscript) else "", reading.last(node)
    if kind in ("Literal", "typing.Literal", "tuple"):
        yield f"unsupported type: {kind.rpartition('.')[2]}[...] is not a supported input type"
    if isinstance(node, ast.Subscript) and name in ("list", "List") and isinstance(node.slice, ast.BinOp):
        yield "unsupported type: nested generics like List[Optional[X]] are not supported"
    if not isinstance(node, ast.Name):
        return
    if name in ("list", "List"):
        yield _external(name, "builtins")
    elif made := _class(target, name):
        if {"BaseModel", "Enum"} & {reading.last(base) for base in made.bases}:
            yield f"unsupported type: {name}"
    elif (module := _outside(target, name)) and module not in ("cog", "typing", "pathlib", "collections.abc"):
        yield _external(name, module)
    elif module == "cog" and name not in ("Path", "File", "Secret") and _outside(target, "Path") == "pathlib":
        yield _external(name, "cog")


def _of_input(target: reading.Target, argument: ast.arg, words: dict[str, ast.expr]) -> Iterator[str]:
    choices, kind = words.get("choices"), ast.unparse(argument.annotation) if argument.annotation else ""
    given = _value(words.get("default"))
    invalid = f"Model schema is invalid: {argument.arg}: invalid default: "
    if isinstance(choices, ast.Tuple | ast.ListComp) or (
        isinstance(choices, ast.List) and any(isinstance(one, ast.Name) for one in choices.elts)
    ):
        yield f"parameter '{argument.arg}': choices expression cannot be statically resolved"
    if isinstance(argument.annotation, ast.BinOp) and "None" not in kind and {"choices", "ge", "le"} & words.keys():
        yield "unsupported type: constraints and choices are not supported on union inputs"
    listed = _value(choices)
    if isinstance(listed, list) and listed and given is not None and given not in listed:
        yield f"{invalid}value is not one of the allowed values {listed}"
    if isinstance(listed, list) and argument.arg == "Status" and given is not None:
        yield f"{invalid}value is not one of the allowed values of the component Status"
    if kind in TYPED and given is not None and not isinstance(given, TYPED[kind]):  # type: ignore[arg-type]
        yield f"{invalid}value must be a {kind}"
    low, high = _value(words.get("ge")), _value(words.get("le"))
    if isinstance(given, int | float):
        if isinstance(low, int | float) and given < low:
            yield f"{invalid}number must be at least {low}"
        if isinstance(high, int | float) and given > high:
            yield f"{invalid}number must be at most {high}"
    if isinstance(pattern := _value(words.get("regex")), str):
        # Cog takes it as it stands in the source, and Go's expressions look neither ahead nor behind.
        written = (ast.get_source_segment(target.source, words["regex"]) or "").lstrip("rR")[1:-1]
        try:
            fits = not isinstance(given, str) or re.search(written, given)
        except re.error:
            fits = None
        if re.search(r"\(\?<?[!=]", pattern):
            yield f"Model schema is invalid: error parsing regexp: invalid or unsupported Perl syntax: {pattern}"
        elif not fits:
            yield f"{invalid}string doesn't match the regular expression {written}"


def _value(node: ast.expr | None) -> Any:
    """A literal's value; None for anything else."""
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _of_both(root: Path, content: dict[str, Any]) -> str:
    """Choices of the runner and of the training share a component by the input's name."""
    run, train = (
        _target(root, str(content[key]), key == "train") if key in content else None for key in ("run", "train")
    )
    if run is None or train is None:
        return ""
    listed = {argument.arg: _words(default) for argument, default in run.inputs}
    for argument, default in train.inputs:
        words, before = _words(default), listed.get(argument.arg, {})
        given, allowed = _value(words.get("default")), _value(before.get("choices"))
        if "choices" in words and isinstance(allowed, list) and given is not None and given not in allowed:
            return f'Model schema is invalid: schema "TrainingInput": value is not one of the allowed values {allowed}'
    return ""


def _words(node: ast.expr | None) -> dict[str, ast.expr]:
    return {word.arg: word.value for word in node.keywords if word.arg} if isinstance(node, ast.Call) else {}


def _of_concurrency(decorator: Any) -> str:
    if not isinstance(decorator, ast.Call) or ast.unparse(decorator.func) not in ("concurrent", "cog.concurrent"):
        return ""
    for keyword in decorator.keywords:
        value = getattr(keyword.value, "value", None)
        if keyword.arg != "max":
            return "@concurrent only supports literal integer max=... arguments"
        if type(value) is not int:
            return "@concurrent max must be an integer literal"
        if isinstance(value, int) and value < 1:
            return "@concurrent max must be at least 1"
    return ""
