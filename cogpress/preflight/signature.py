"""Check the runner and the training function from source, without running them: beyond what Cog itself refuses.

`cogpress/cog/reading.py` knows what Cog's parser loses. Without Cog's verdict, only the forms that the repository's own
`predict.py` and `train.py` use are known to be good.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator

from cogpress.cog import reading
from cogpress.cog.reading import Method, Target
from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some, warning
from cogpress.preflight.cogyaml import WITH_COG
from cogpress.preflight.facts import Facts

TOPIC = "Inputs"

_EXAMPLES = {"run": 'run: "predict.py:Runner"', "train": 'train: "train.py:train"'}


def find(facts: Facts, key: str) -> Target | Finding | None:
    """The runner (`run`) or the training function (`train`), or why it cannot be read; None if cog.yaml names none."""
    cog = facts.cog or {}
    reference = cog.get("run") or cog.get("predict") if key == "run" else cog.get(key)
    if reference is None:
        return None
    example = f"Write {_EXAMPLES[key]}."
    file, colon, name = str(reference).partition(":")
    if not (file.endswith(".py") and colon and name.isidentifier()):
        return failed(f"{key} is {reference!r}.", example)
    try:
        return reading.find(facts.root, f"{file}:{name}", reading.METHODS if key == "run" else reading.TRAINING)
    except OSError:
        return failed(f"{file}, which {facts.file} names, is not there.", example)
    except UnicodeDecodeError:
        return failed(f"{file} is not UTF-8.", "Save it as UTF-8.")
    except SyntaxError as error:
        # Cog's parser forgives it; the server does not start.
        return failed(f"{file}, line {error.lineno}: {error.msg}.", "Correct that line.")


def _targets(facts: Facts) -> Iterator[Target]:
    for key in _EXAMPLES:
        target = find(facts, key)
        if isinstance(target, Target):
            yield target


def _runner(facts: Facts) -> Iterator[Finding]:
    found = {key: find(facts, key) for key in _EXAMPLES}
    if found["run"] is None and found["train"] is None:
        yield failed(f"{facts.file} names no runner.", f"Write {_EXAMPLES['run']}.")
    for target in found.values():
        if isinstance(target, Target):
            yield passed(target.reference)
        elif target is not None:
            yield target


def _readable(facts: Facts) -> Iterator[Finding]:
    for target in _targets(facts):
        lost = list(reading.losses(target))
        for loss in lost:
            how = warning if loss.shown else failed
            yield how(f"{target.file}, line {loss.line}: {loss.what}.", f"{loss.fix}.")
        unsure = [] if facts.verdict.problem is None or lost else list(_unsure(target))
        if unsure:
            yield skipped(f"{target.reference}: only Cog can tell about {some(unsure)}.", WITH_COG)
        elif not lost:
            yield passed(f"{target.reference}: nothing of its {len(target.inputs)} inputs is lost")


def _unsure(target: Target) -> Iterator[str]:
    """What is not of the forms that the repository's own files use."""
    method = target.method
    if method is None:
        yield target.name
        return
    given = method.args
    if given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs:
        yield f"the parameters of {method.name}()"
    yield from (ast.unparse(item) for item in method.decorator_list if not _own_decorator(item, method))
    yield from (argument.arg for argument, default in target.inputs if not _own_input(argument.annotation, default))
    output = ast.unparse(method.returns) if method.returns else "no output"
    classes = {
        node.name for node in target.module.body if isinstance(node, ast.ClassDef) and _names(node) == ["BaseModel"]
    }
    if output not in {"ConcatenateIterator[str]", "str"} | classes:
        yield f"the output {output}"


def _names(node: ast.ClassDef) -> list[str]:
    return [reading.last(base) for base in node.bases]


def _own_decorator(node: ast.expr, method: Method) -> bool:
    if ast.unparse(node) in ("cog.streaming", "streaming"):
        return reading.last(method.returns) == "ConcatenateIterator" if method.returns else False
    number = reading.concurrency(method)
    alone = ast.unparse(node) in (f"cog.concurrent(max={number})", f"concurrent(max={number})")
    return alone and number >= 1 and (number == 1 or isinstance(method, ast.AsyncFunctionDef))


_TYPES = {"str": str, "int": int, "float": float, "bool": bool}


def _own_input(annotation: ast.expr | None, default: ast.expr | None) -> bool:
    """Whether it is a type of the repository's own inputs with literals in `Input()`, and the default fits them."""
    optional = isinstance(annotation, ast.Subscript) and reading.last(annotation) == "Optional"
    inner = annotation.slice if optional and isinstance(annotation, ast.Subscript) else annotation
    kind = ast.unparse(inner) if inner is not None else ""
    if kind not in {*_TYPES, "cog.Path"} or not isinstance(default, ast.Call) or ast.unparse(default.func) != "Input":
        return False
    try:
        words = {str(word.arg): ast.literal_eval(word.value) for word in default.keywords}
    except (ValueError, TypeError):  # the latter of a list as a key
        return False
    if default.args or not words.keys() <= {"description", "default", "ge", "le", "choices"}:
        return False
    choices = words.get("choices")
    if choices is not None and not (
        kind == "str" and isinstance(choices, list) and choices and all(isinstance(one, str) for one in choices)
    ):
        return False
    numbers = {"int": (int,), "float": (int, float)}.get(kind, ())
    low, high = words.get("ge", -math.inf), words.get("le", math.inf)
    bounds = [words[name] for name in ("ge", "le") if name in words]
    if not all(type(one) in numbers and math.isfinite(one) for one in bounds) or low > high:
        return False
    if words.get("default") is None:
        return "default" not in words or optional
    value = words["default"]
    if numbers:
        return type(value) in numbers and low <= value <= high
    return type(value) is _TYPES.get(kind) and (choices is None or value in choices)


def _concurrency(facts: Facts) -> Iterator[Finding]:
    target, training = find(facts, "run"), find(facts, "train")
    if not isinstance(target, Target) or target.method is None:
        yield skipped("there is no runner to read")
        return
    method = target.method
    listed = (facts.cog or {}).get("concurrency")
    older = listed.get("max") if isinstance(listed, dict) else None
    most = max(reading.concurrency(method), older if isinstance(older, int) else 1)
    minor = str(facts.build.get("python_version") or "").split(".")[1:2]
    if most > 1 and not isinstance(method, ast.AsyncFunctionDef):
        yield failed(f"{most} predictions at once, and {method.name}() is not async: the build refuses it.",
                     "Write async def run.")  # fmt: skip
    elif most > 1 and minor and minor[0].isdecimal() and int(minor[0]) < 11:
        yield failed(f"{most} predictions at once need Python 3.11: the build refuses 3.{minor[0]}.",
                     'Write python_version: "3.12".')  # fmt: skip
    elif most > 1 and isinstance(training, Target) and isinstance(training.method, ast.FunctionDef):
        yield failed(
            f"{training.reference} is not async, and no training starts in an image with @cog.concurrent(max={most}).",
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
        streaming = reading.decorator(method, "streaming") is not None
        yield passed(f"{most} predictions at once{', streamed' if streaming else ''}")


def _owner(method: Method, wanted: ast.AST) -> bool:
    """Whether a node belongs to the method itself, not to a function in it."""
    inner = [node for node in ast.walk(method) if isinstance(node, Method | ast.Lambda) and node is not method]
    return not any(wanted is node for function in inner for node in ast.walk(function))


def _described(facts: Facts) -> Iterator[Finding]:
    for target in _targets(facts):
        calls = [(argument.arg, default) for argument, default in target.inputs if isinstance(default, ast.Call | None)]
        bare = [name for name, call in calls if call is None or "description" not in {w.arg for w in call.keywords}]
        if bare:
            yield warning(f"Without a description: {some(bare)} of {target.reference}.", "Add one.")
        else:
            yield passed(f"{target.reference}: every input has a description")


CHECKS = [
    Check(TOPIC, "runner", _runner),
    Check(TOPIC, "readable by Cog", _readable),
    Check(TOPIC, "concurrency", _concurrency),
    Check(TOPIC, "descriptions", _described),
]
