"""Check the runner and the training function as `cog build` parses them: from source, without running it.

The rules come from public copies of Cog's source, which do not tell releases apart: the build has the last word.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some, warning
from cogpress.preflight.facts import Facts

TOPIC = "Inputs"

PRIMITIVES = {"bool", "float", "int", "str", "Path", "File", "Secret", "Any", "dict", "Dict"}
LITERAL_BOUNDS = ("ge", "le", "min_length", "max_length")

Method = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Target:
    """What cog.yaml names, found in its file; `problem` says why not."""

    reference: str
    module: ast.Module | None = None
    owner: ast.ClassDef | None = None
    method: Method | None = None
    problem: str | None = None
    fix: str = ""


def find(facts: Facts, key: str) -> Target | None:
    """The runner (`run`) or the training function (`train`); None if cog.yaml names none."""
    cog = facts.cog or {}
    reference = cog.get("run") or cog.get("predict") if key == "run" else cog.get(key)
    if reference is None:
        return None
    example = 'run: "predict.py:Runner"' if key == "run" else 'train: "train.py:train"'
    if not isinstance(reference, str) or not re.fullmatch(r"[^:]+\.py:\w+", reference):
        return Target(str(reference), problem=f"{key} is {reference!r}.", fix=f"Write {example}.")
    file, _, name = reference.partition(":")
    text = facts.text(file)
    if text is None:
        return Target(reference, problem=f"{file}, which cog.yaml names, is not there.", fix=f"Write {example}.")
    try:
        module = ast.parse(text)
    except SyntaxError as error:
        return Target(reference, problem=f"{file}, line {error.lineno}: {error.msg}.", fix="Correct that line.")
    for node in module.body:
        if isinstance(node, Method) and node.name == name:
            return Target(reference, module, None, node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            methods = [item for item in node.body if isinstance(item, Method)]
            wanted = [item for item in methods if item.name in (("run", "predict") if key == "run" else ("train",))]
            if not wanted:
                return Target(
                    reference, problem=f"{reference} has no method run().", fix="Add it, or correct cog.yaml."
                )
            if len(wanted) > 1:
                return Target(reference, problem=f"{reference} has run() and predict().", fix="Keep run() alone.")
            return Target(reference, module, node, wanted[0])
    return Target(
        reference, problem=f"{file} has no {name} at its top level.", fix=f"Define it there, or write {example}."
    )


def _runner(facts: Facts) -> Iterator[Finding]:
    for key in ("run", "train"):
        target = find(facts, key)
        if target is None:
            if key == "run":
                yield failed("cog.yaml names no runner.", 'Write run: "predict.py:Runner".')
        elif target.problem:
            yield failed(target.problem, target.fix)
        else:
            bases = {_last(base) for base in target.owner.bases} if target.owner else set()
            if "BasePredictor" in bases:
                yield warning(f"{target.reference} is a BasePredictor, a deprecated name.", "Write BaseRunner.")
            if target.method and target.method.name == "predict":
                yield warning(f"{target.reference} defines predict(), a deprecated name.", "Call the method run.")
            yield passed(target.reference)


def _readable(facts: Facts) -> Iterator[Finding]:
    for key in ("run", "train"):
        target = find(facts, key)
        if target is None or target.method is None or target.module is None:
            if key == "run":
                yield skipped("there is no runner to read")
            continue
        found = list(problems(target))
        count = len(_inputs(target))
        yield from found
        if not any(finding.outcome == "failed" for finding in found):
            yield passed(f"{target.reference}: {count} inputs can be read without running it")


def problems(target: Target) -> Iterator[Finding]:
    """What Cog's parser refuses or misreads."""
    assert target.method is not None
    assert target.module is not None
    arguments, method = target.method.args, target.method
    where = f"{target.reference.partition(':')[0]}, line {{}}: "
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs:
        yield failed(
            where.format(method.lineno) + f"{method.name}() has *, ** or / in its parameters, which Cog refuses.",
            "Name every input, with a type and Input().",
        )
    if target.owner and [argument.arg for argument in arguments.args[:1]] != ["self"]:
        yield failed(where.format(method.lineno) + f"{method.name}() has no self.", "Make it a method of the class.")
    constants = _constants(target.module)
    for argument, default in _inputs(target):
        at = where.format(argument.lineno) + argument.arg
        if argument.annotation is None:
            yield failed(f"{at} has no type.", f"Write {argument.arg}: str = Input(...), or another type.")
        elif problem := _type_problem(argument.annotation, target.module):
            yield failed(
                f"{at} is a {ast.unparse(argument.annotation)}: {problem}.",
                "Write str, int, float, bool, cog.Path, cog.Secret, a list of one of these, or Optional[...].",
            )
        if default is not None:
            yield from _default_problems(at, default, constants)
    yield from _output_problems(where.format(method.lineno), method, target.module)


def _inputs(target: Target) -> list[tuple[ast.arg, ast.expr | None]]:
    assert target.method is not None
    listed = target.method.args.args
    defaults: list[ast.expr | None] = [None] * (len(listed) - len(target.method.args.defaults))
    pairs = list(zip(listed, [*defaults, *target.method.args.defaults], strict=True))
    return pairs[1:] if target.owner else pairs


def _type_problem(node: ast.expr, module: ast.Module) -> str | None:
    """Why Cog cannot read an input's annotation; None if it can."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            node = ast.parse(node.value, mode="eval").body
        except SyntaxError:
            return "its type is not valid Python"
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _union_problem([node.left, node.right], module)
    if isinstance(node, ast.Subscript):
        outer = _last(node.value)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if outer == "Optional":
            return _type_problem(inner[0], module) if len(inner) == 1 else "Optional takes one type"
        if outer == "Union":
            return _union_problem(list(inner), module)
        if outer == "Annotated":
            return _type_problem(inner[0], module)
        if outer in ("dict", "Dict"):
            return None
        if outer in ("list", "List"):
            if len(inner) != 1:
                return "a list takes one type"
            nested = isinstance(inner[0], ast.BinOp) or _last(inner[0]) in ("Optional", "list", "List")
            return (
                "a list of lists or of optional values cannot be an input"
                if nested
                else _type_problem(inner[0], module)
            )
        return f"{outer}[...] cannot be an input" + ("; give choices to Input()" if outer == "Literal" else "")
    name = _last(node)
    typed = {
        item.name for item in module.body if isinstance(item, ast.ClassDef) and "TypedDict" in map(_last, item.bases)
    }
    return None if name in PRIMITIVES | typed else "Cog does not know this type"


def _union_problem(members: list[ast.expr], module: ast.Module) -> str | None:
    some_type = [item for item in members if not (isinstance(item, ast.Constant) and item.value is None)]
    if len(members) != 2 or len(some_type) != 1:
        return "a union can only be one type or None"
    return _type_problem(some_type[0], module)


def _default_problems(at: str, node: ast.expr, constants: dict[str, ast.expr]) -> Iterator[Finding]:
    if not (isinstance(node, ast.Call) and _last(node.func) == "Input"):
        if not _literal(node, constants):
            yield failed(
                f"{at} has the default {ast.unparse(node)[:60]}, which can only be known by running it.",
                "Write the value itself, a constant of the module, or Input(default=...).",
            )
        return
    if node.args:
        yield failed(f"{at}: Cog ignores a default that is not named.", "Write Input(default=...).")
    for keyword in node.keywords:
        name, value = keyword.arg, keyword.value
        written = ast.unparse(value)[:60]
        if name is None:
            yield failed(f"{at}: Cog ignores ** in Input().", "Name each argument.")
        elif name == "default_factory":
            yield failed(f"{at} has a default_factory, which Cog's build refuses.", "Give default=, or None.")
        elif name == "default" and not _literal(value, constants):
            yield failed(f"{at}: Cog reads the default {written} as none.", "Write the value, or a module constant.")
        elif name in LITERAL_BOUNDS and not _number(value):
            yield failed(
                f"{at}: Cog drops {name}={written}, which is not a literal number.", "Write the number itself."
            )
        elif name == "choices" and not _choices(value, constants):
            yield failed(
                f"{at} has the choices {written}, which can only be known by running it.", "Write them as a list."
            )
        elif name in ("description", "regex") and not _text(value, {} if name == "regex" else constants):
            yield failed(f"{at}: Cog drops the {name} {written}.", "Write one string literal, without f or +.")


def _output_problems(where: str, method: Method, module: ast.Module) -> Iterator[Finding]:
    node = method.returns
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        yield failed(f"{where}{method.name}() does not declare its output.", "Write -> ConcatenateIterator[str]:")
        return
    text = ast.unparse(node)
    outer = _last(node.value if isinstance(node, ast.Subscript) else node)
    if outer == "Optional" or (isinstance(node, ast.BinOp) and "None" in text):
        yield failed(f"{where}the output {text} is optional, which Cog refuses.", "Name one type.")
    elif outer.endswith("ConcatenateIterator"):
        if not isinstance(node, ast.Subscript) or ast.unparse(node.slice) != "str":
            yield failed(f"{where}{text} does not yield strings.", "Write ConcatenateIterator[str].")
    elif isinstance(node, ast.Name) and node.id not in PRIMITIVES | {"list", "List"}:
        local = any(isinstance(item, ast.ClassDef) and item.name == node.id for item in module.body)
        if not local:
            yield failed(
                f"{where}the output {text} is defined in another file, where Cog does not look.",
                "Define it in this one, as a BaseModel.",
            )


def _concurrency(facts: Facts) -> Iterator[Finding]:
    target = find(facts, "run")
    if target is None or target.method is None:
        yield skipped("there is no runner to read")
        return
    method = target.method
    decorators = [item for item in method.decorator_list if _last(_called(item)) == "concurrent"]
    streaming = any(_last(_called(item)) == "streaming" for item in method.decorator_list)
    most = 1
    for item in decorators:
        values = [word.value for word in item.keywords if word.arg == "max"] if isinstance(item, ast.Call) else []
        if len(values) != 1 or not isinstance(values[0], ast.Constant) or not isinstance(values[0].value, int):
            yield failed("@cog.concurrent has no literal number.", "Write @cog.concurrent(max=80), the number itself.")
            return
        most = values[0].value
    if most > 1 and not isinstance(method, ast.AsyncFunctionDef):
        yield failed(
            f"@cog.concurrent(max={most}) decorates a method that is not async, which Cog refuses.",
            "Write async def run.",
        )
    elif most > 1 and (train := find(facts, "train")) and isinstance(train.method, ast.FunctionDef):
        yield failed(
            f"{train.reference} is not async, and no training starts in an image with @cog.concurrent(max={most}).",
            "Write async def train, and leave the work to a process or thread, as the repository's train.py does.",
        )
    elif isinstance(method, ast.AsyncFunctionDef) and any(
        isinstance(node, ast.Yield) and _owner(method, node) for node in ast.walk(method)
    ):
        yield warning(
            "run() is an async generator, whose output Cog collects and sends at the end: nothing streams.",
            "Return cogpress.cog.streaming.stream(...) from a coroutine, as the repository's predict.py does.",
        )
    else:
        yield passed(f"{most} predictions at once{', streamed' if streaming else ''}")


def _described(facts: Facts) -> Iterator[Finding]:
    for key in ("run", "train"):
        target = find(facts, key)
        if target is None or target.method is None:
            continue
        inputs = _inputs(target)
        bare = [argument.arg for argument, default in inputs if "description" not in _words(default)]
        if bare:
            yield warning(f"Without a description: {some(bare)} of {target.reference}.", "Add one.")
        file = target.reference.partition(":")[0]
        source = facts.text(file) or ""
        joined = [argument.arg for argument, default in inputs if _joined(_words(default).get("description"), source)]
        if joined:
            yield warning(
                f"The descriptions of {some(joined)} in {file} are written in parts or with escapes, which some "
                "releases of Cog show as they stand, quotes included.",
                "Write each as one string literal, and check the form after the push.",
            )
        if not bare and not joined:
            yield passed(f"{target.reference}: every input has a description")


def _joined(node: ast.expr | None, source: str) -> bool:
    written = ast.get_source_segment(source, node) if node is not None else None
    if written is None or not isinstance(node, ast.Constant) or not isinstance(node.value, str):
        return False
    return node.value not in written


def _words(default: ast.expr | None) -> dict[str | None, ast.expr]:
    return {word.arg: word.value for word in default.keywords} if isinstance(default, ast.Call) else {}


def _constants(module: ast.Module) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def _literal(node: ast.expr, constants: dict[str, ast.expr]) -> bool:
    """Whether Cog's parser can evaluate it: a literal or a module constant."""
    if isinstance(node, ast.Name):
        return node.id in constants and _literal(constants[node.id], {})
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return all(_literal(item, {}) for item in node.elts)
    if isinstance(node, ast.Dict):
        return all(key is not None and _literal(key, {}) for key in node.keys) and all(
            _literal(value, {}) for value in node.values
        )
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        return isinstance(node.operand, ast.Constant) and isinstance(node.operand.value, int | float)
    return isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | type(None))


def _number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> bool:
    node = constants.get(node.id, node) if isinstance(node, ast.Name) else node
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _choices(node: ast.expr, constants: dict[str, ast.expr]) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _choices(node.left, constants) and _choices(node.right, constants)
    if isinstance(node, ast.Call) and _last(node.func) == "list" and len(node.args) == 1:
        call = node.args[0]
        inside = isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and not call.args
        if inside and call.func.attr in ("keys", "values") and isinstance(call.func.value, ast.Name):  # type: ignore[attr-defined]
            name = call.func.value.id  # type: ignore[attr-defined]
            return isinstance(constants.get(name), ast.Dict) and _literal(constants[name], {})
        return False
    found = constants.get(node.id, node) if isinstance(node, ast.Name) else node
    return isinstance(found, ast.List) and _literal(found, {})


def _called(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node


def _last(node: ast.expr) -> str:
    """`Path` of both `Path` and `cog.Path`."""
    if isinstance(node, ast.Subscript):
        return _last(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _owner(method: Method, wanted: ast.AST) -> bool:
    """Whether a node belongs to the method itself, not to a function in it."""
    inner = [node for node in ast.walk(method) if isinstance(node, Method | ast.Lambda) and node is not method]
    return not any(wanted is node for function in inner for node in ast.walk(function))


CHECKS = [
    Check(TOPIC, "runner", _runner),
    Check(TOPIC, "readable by Cog", _readable),
    Check(TOPIC, "concurrency", _concurrency),
    Check(TOPIC, "descriptions", _described),
]
