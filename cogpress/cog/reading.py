"""What Cog's build reads of a runner's source, and where it reads something else than Python does.

Cog parses the source without running it. What it refuses it says itself (`program.verdict`); this module finds what it
takes without a word and then loses or breaks.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

Method = ast.FunctionDef | ast.AsyncFunctionDef

METHODS = ("run", "predict")
"""A runner's method: its name, and the deprecated one."""

TRAINING = ("train",)
"""A training's."""

_TEXTS = ("default", "description", "regex")
_BOUNDS = ("ge", "le")
_LENGTHS = ("min_length", "max_length")
_STRING = re.compile(r"(?s)([A-Za-z]*)('''|\"\"\"|'|\")(.*)\2")


@dataclass(frozen=True)
class Target:
    """What `run` or `train` of cog.yaml names: its module, its class if it is one, and its method.

    `method` is None where it cannot be found in this file alone.
    """

    reference: str
    source: str
    module: ast.Module
    owner: ast.ClassDef | None
    method: Method | None
    methods: tuple[str, ...]

    @property
    def training(self) -> bool:
        """Whether `train` names it."""
        return self.methods == TRAINING

    @property
    def file(self) -> str:
        """The file, from the project's folder."""
        return self.reference.partition(":")[0]

    @property
    def name(self) -> str:
        """The class or function in it."""
        return self.reference.partition(":")[2]

    @property
    def inputs(self) -> list[tuple[ast.arg, ast.expr | None]]:
        """Each input with its default, in order."""
        if self.method is None:
            return []
        given = self.method.args
        listed = [*given.posonlyargs, *given.args]
        defaults = [*[None] * (len(listed) - len(given.defaults)), *given.defaults]
        pairs: list[tuple[ast.arg, ast.expr | None]] = list(zip(listed, defaults, strict=True))
        return (pairs[1:] if self.owner else pairs) + list(zip(given.kwonlyargs, given.kw_defaults, strict=True))


@dataclass(frozen=True)
class Loss:
    """What Cog takes and then loses or breaks.

    Attributes:
        line: in the file.
        what: is lost.
        fix: what to write instead.
        shown: only a text in the form suffers, no value.
    """

    line: int
    what: str
    fix: str
    shown: bool = False


def find(root: Path, reference: str, methods: tuple[str, ...] = METHODS) -> Target:
    """Read what a reference such as `predict.py:Runner` names; methods are searched in classes above it too.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is not UTF-8.
        SyntaxError: it is not Python.
    """
    file, _, name = reference.partition(":")
    source = (root / file).read_text(encoding="utf-8-sig")  # Cog and Python take the mark of Windows' editors
    try:
        module = ast.parse(source)
    except (ValueError, RecursionError, MemoryError) as error:  # a NUL character, and nesting that Python refuses
        raise SyntaxError(str(error) or "too deeply nested", (file, 1, 0, "")) from None
    named = next((node for node in _defined(module) if node.name == name), None)
    if isinstance(named, ast.ClassDef):
        return Target(reference, source, module, named, _method(module, named, methods), methods)
    return Target(reference, source, module, None, named, methods)


def _defined(module: ast.Module) -> list[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in module.body if isinstance(node, ast.ClassDef | Method)]


def _bound(module: ast.Module) -> set[str]:
    """The names at a module's top level, imported ones too."""
    froms = [node for node in module.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {one.asname or one.name for node in froms for one in node.names}
    return names | set(constants(module)) | {node.name for node in _defined(module)}


def _method(module: ast.Module, owner: ast.ClassDef, names: tuple[str, ...], depth: int = 8) -> Method | None:
    for item in owner.body:
        if isinstance(item, Method) and item.name in names:
            return item
    above = [node for node in module.body if isinstance(node, ast.ClassDef)]
    for base in owner.bases:
        for node in above:
            if depth and isinstance(base, ast.Name) and node.name == base.id and node is not owner:
                return _method(module, node, names, depth - 1)
    return None


def defaulted(target: Target) -> set[str]:
    """The inputs that name a default, None too."""
    named = _input_names(target)
    found = set()
    for argument, value in target.inputs:
        if isinstance(value, ast.Call) and last(value.func) in named:
            if any(word.arg == "default" for word in value.keywords):
                found.add(argument.arg)
        elif value is not None:
            found.add(argument.arg)
    return found


def decorator(method: Method | None, name: str) -> ast.expr | None:
    """A method's decorator of Cog's, such as `concurrent`, called or not."""
    items = method.decorator_list if method else []
    return next((item for item in items if last(item.func if isinstance(item, ast.Call) else item) == name), None)


def concurrency(method: Method | None) -> int:
    """The number in `@cog.concurrent(max=N)`, else 1."""
    found = decorator(method, "concurrent")
    words = found.keywords if isinstance(found, ast.Call) else []
    values = [word.value.value for word in words if word.arg == "max" and isinstance(word.value, ast.Constant)]
    return int(values[0]) if values and isinstance(values[0], int) else 1


def last(node: ast.expr) -> str:
    """`Path` of both `Path` and `cog.Path`."""
    if isinstance(node, ast.Subscript):
        return last(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def constants(module: ast.Module) -> dict[str, ast.expr]:
    """The values of a module's constants."""
    found: dict[str, ast.expr] = {}
    for node in module.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def imported(module: ast.Module, source: str, name: str) -> set[str]:
    """The names under which a module imports `name` from `source`."""
    froms = [node for node in module.body if isinstance(node, ast.ImportFrom) and node.module == source]
    return {one.asname or one.name for node in froms for one in node.names if one.name == name}


def losses(target: Target) -> Iterator[Loss]:
    """Each thing that Cog takes without a word, and then loses or breaks."""
    yield from _structure(target)
    if target.method is None:
        return
    paths = imported(target.module, "pathlib", "Path")
    for argument, default in target.inputs:
        name, line = argument.arg, argument.lineno
        if argument.annotation is None:
            yield Loss(line, f"{name} has no type, and Cog drops it", f"Write {name}: str = Input(...)")
        elif any(_is_pathlib(node, paths) for node in ast.walk(argument.annotation)):
            told = f"{name} is pathlib's Path, and the runtime passes the URL as text"
            yield Loss(line, told, "Write cog.Path")
        if any(part and not part[0].isascii() for part in name.split("_")):
            yield Loss(line, f"Cog breaks the first letter of {name} in the form", "Begin it with a to z", shown=True)
        if isinstance(default, ast.Call) and last(default.func) in _input_names(target):
            yield from _words(target, name, default)
    yield from _output_order(target)


def _is_pathlib(node: ast.AST, names: set[str]) -> bool:
    return (isinstance(node, ast.Name) and node.id in names) or ast.unparse(node) == "pathlib.Path"


def _input_names(target: Target) -> set[str]:
    return imported(target.module, "cog", "Input") | {"Input"}


def _structure(target: Target) -> Iterator[Loss]:
    name, method, owner = target.name, target.method, target.owner
    if target.training and owner is not None:
        yield Loss(owner.lineno, f"{name} is a class, and no training starts", "Write a function of the module")
    if target.training and name not in _bound(target.module):
        yield Loss(1, f"nothing here is named {name}: Cog takes train() instead, and no training starts", "Rename one")
    same = [node for node in _defined(target.module) if node.name == name]
    if len(same) > 1:
        yield Loss(
            same[-1].lineno,
            f"{name} is defined {len(same)} times: Cog reads the first, Python runs the last",
            "Keep one",
        )
    if method is None or owner is None:
        return
    own = {item.name for item in owner.body if isinstance(item, Method)}
    if own >= set(METHODS):
        yield Loss(owner.lineno, f"{name} has run() and predict(), and then does not start", "Keep run() alone")
    positional = [*method.args.posonlyargs, *method.args.args]
    if not positional or positional[0].arg != "self":
        yield Loss(method.lineno, f"{method.name}() has no self, so {name} does not start", "Make it a method")


def _words(target: Target, name: str, call: ast.Call) -> Iterator[Loss]:
    """What is lost of `Input(...)`."""
    known = constants(target.module)
    if call.args:
        yield Loss(
            call.args[0].lineno,
            f"{name}: Cog ignores a default that is not named, and asks for the input",
            "Write Input(default=...)",
        )
    for word in call.keywords:
        value, shown = word.value, ast.unparse(word.value)[:60]
        if word.arg is None:
            yield Loss(value.lineno, f"{name}: Cog ignores ** in Input()", "Name each argument")
            continue
        whole = (ast.get_source_segment(target.source, word) or "").partition("=")[2].strip()
        wrapped = whole.startswith("(") and not isinstance(value, ast.Tuple)
        found = known.get(value.id, value) if isinstance(value, ast.Name) and word.arg in _TEXTS else value
        if word.arg in _BOUNDS and (wrapped or not _number(value)):
            yield Loss(value.lineno, f"{name}: Cog drops {word.arg}={shown}", "Write the number itself")
        elif word.arg in _LENGTHS and (wrapped or not (isinstance(value, ast.Constant) and type(value.value) is int)):
            yield Loss(value.lineno, f"{name}: Cog misreads {word.arg}={shown}", "Write a whole number, 0 or more")
        elif word.arg == "description" and (wrapped or not _text(found)):
            yield Loss(value.lineno, f"{name}: Cog drops the description {shown}", "Write one string literal")
        elif word.arg == "regex" and (wrapped or not _text(found)):
            yield Loss(value.lineno, f"{name}: Cog drops the regex {shown}", "Write one string literal")
        elif word.arg == "default" and (wrapped or not _literal(found, known)):
            yield Loss(
                value.lineno,
                f"{name}: Cog reads the default {shown} as none, and asks for the input",
                "Write the value itself, or a constant of this file",
            )
        elif word.arg in _TEXTS and any(map(_misread, _strings(target, found))):
            yield Loss(
                value.lineno,
                f"{name}: Cog takes the {word.arg} {shown} as it stands in the source, with its quotes and backslashes",
                "Write one plain string literal, r'...' for backslashes",
                shown=word.arg == "description",
            )


def _strings(target: Target, node: ast.expr) -> list[str]:
    """The source of each string in a value."""
    texts = [one for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return [ast.get_source_segment(target.source, one) or "" for one in texts]


def _misread(written: str) -> bool:
    """Whether what stands between the outer quotes is another text than Python's, or the prefix is not understood."""
    found = _STRING.fullmatch(written)
    if found is None:
        return True
    prefix, quotes, inside = found.groups()
    if prefix.lower() == "r":
        return len(quotes) > 1
    try:
        return bool(prefix) or ast.literal_eval(written) != inside
    except SyntaxError:
        return True


def descriptions(target: Target) -> dict[str, str]:
    """The descriptions that Cog shows otherwise than they are meant: as they stand between the outer quotes."""
    found = {}
    for argument, call in target.inputs:
        for word in call.keywords if isinstance(call, ast.Call) else []:
            if word.arg == "description" and isinstance(word.value, ast.Constant):
                written = ast.get_source_segment(target.source, word.value) or ""
                if _misread(written) and (parts := _STRING.fullmatch(written)):
                    found[argument.arg] = parts[3]
    return found


def _text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _literal(node: ast.expr, known: dict[str, ast.expr]) -> bool:
    """Whether Cog can tell a default: a literal within 64 bits, or a constant of the module."""
    if isinstance(node, ast.Name):
        return node.id in known and _literal(known[node.id], {})
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return all(_literal(item, {}) for item in node.elts)
    if isinstance(node, ast.Dict):
        return all(key is not None and _literal(key, {}) for key in node.keys) and all(
            _literal(value, {}) for value in node.values
        )
    if isinstance(node, ast.UnaryOp):
        return _number(node)
    if not isinstance(node, ast.Constant) or isinstance(node.value, bytes | complex):
        return False
    return not isinstance(node.value, int) or abs(node.value) < 2**63


def _output_order(target: Target) -> Iterator[Loss]:
    """The runtime makes a dataclass of an output's model, where fields with a default come last."""
    assert target.method is not None
    named = last(target.method.returns) if target.method.returns is not None else ""
    for node in target.module.body:
        if isinstance(node, ast.ClassDef) and node.name == named and "BaseModel" in map(last, node.bases):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            late = [item for before, item in pairwise(fields) if before.value and not item.value]
            for item in late:
                yield Loss(
                    item.lineno,
                    f"{ast.unparse(item.target)} of {named} has no default but follows one that has, and the runtime "
                    "does not start",
                    "Put it first",
                )
