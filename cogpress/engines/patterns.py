"""Regular expressions as grammars of JSON strings.

xgrammar's own automaton for patterns in schemas takes some of what it must not (0.2.8: `^a(?:b+c)?$` takes "ab"), and
none that needs an escape in JSON. Imports nothing of this package; see `schemas`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from re import _constants as code  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

CHARACTER = "string_character"
"""The name of the rule for any character; `RULES` has it."""

_LAST = 0x10FFFF
_HALVES = (0xD800, 0xDFFF)
_ESCAPES = {0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r", 0x22: '\\"', 0x5C: "\\\\"}
"""Characters that JSON writes as a backslash and this one, which is escaped for EBNF. Other control characters and
escapes by number are never generated: half a character could count as none or as one."""

_SPACES = ((0x09, 0x0D), (0x20, 0x20))
_WIDE_SPACES = ((0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F))
_CATEGORIES: dict[Any, Iterable[tuple[int, int]]] = {
    code.CATEGORY_DIGIT: ((0x30, 0x39),),
    code.CATEGORY_WORD: ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    code.CATEGORY_SPACE: _SPACES,
}
_OTHERS = {
    code.CATEGORY_NOT_DIGIT: _CATEGORIES[code.CATEGORY_DIGIT],
    code.CATEGORY_NOT_WORD: _CATEGORIES[code.CATEGORY_WORD],
    code.CATEGORY_NOT_SPACE: (*_SPACES, (0x1C, 0x1F), (0x85, 0x85), *_WIDE_SPACES, (0x3000, 0x3000), (0xFEFF, 0xFEFF)),
}
_LINE_ENDS = ((0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029))


def ebnf(pattern: str) -> str:
    """The inside of JSON strings that match, as an EBNF expression. `^` and `$` may stand only at the ends.

    The dialect is what ECMA 262 and Python share; `\\d`, `\\w` and `\\s` are ASCII's.

    Raises:
        ValueError: names what cannot be enforced.
    """
    if found := unenforced(pattern) or _foreign(pattern):
        raise ValueError(found)
    try:
        return _whole(list(parser.parse(pattern)), begun=False)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"an error ({error})") from None


def unenforced(pattern: str) -> str:
    """What in a regular expression xgrammar ignores, in words; empty if nothing."""
    depth, inside, at = 0, False, 0
    while at < len(pattern):
        one, before, after = pattern[at], pattern[at - 1 : at], pattern[at + 1 : at + 2]
        if one == "\\":
            at += 1
        elif inside:
            inside = one != "]"
        elif one == "[":
            inside = True
        elif one == "(":
            depth += 1
            if after == "?" and pattern[at + 2 : at + 3] != ":":
                return f"the group {json.dumps(pattern[at : at + 4])}"
        elif one == ")":
            depth -= 1
        elif one == "^" and at and (depth or before != "|"):
            return "^ inside it"
        elif one == "$" and after and (depth or after != "|"):
            return "$ inside it"
        at += 1
    return ""


def _foreign(pattern: str) -> str:
    """What Python reads otherwise than ECMA 262."""
    at = 0
    while at < len(pattern):
        two = pattern[at : at + 2]
        if two in (r"\A", r"\Z", r"\a", r"\U", r"\N", "{,", "[]") or re.match(r"\[\^\]|\\[0-9][0-9]", pattern[at:]):
            return json.dumps(pattern[at : at + 3])
        at += 2 if two.startswith("\\") else 1
    return ""


def _whole(items: list[Any], *, begun: bool) -> str:
    """A sequence that ends where the string ends, with what may stand before and after it."""
    if len(items) == 1 and items[0][0] is code.BRANCH:
        return _either(_whole(list(one), begun=begun) for one in items[0][1][1])
    while items and items[0] == (code.AT, code.AT_BEGINNING):
        items, begun = items[1:], True
    before = [] if begun else [f"{CHARACTER}*"]
    if items and items[-1][0] is code.BRANCH:
        *items, (_, (_, branches)) = items
        after = [_either(_whole(list(one), begun=True) for one in branches)]
    elif items and items[-1] == (code.AT, code.AT_END):
        items, after = items[:-1], []
    else:
        after = [f"{CHARACTER}*"]
    return " ".join([*before, _sequence(items), *after])


def repeated(inner: str, low: int, high: int | None) -> str:
    """EBNF of something that comes from `low` to `high` times; None for any number.

    xgrammar takes seconds for each token of a repetition of some hundreds, so a long one is made of short ones.
    """
    if len(inner) > _LONG or max(low, high or 0) <= _SHORT:  # the text of nested ones multiplies
        return f"{inner}{{{low},{'' if high is None else high}}}"
    short = f"({inner}{{{_SHORT}}})"
    before = [f"{short}{{{low // _SHORT}}}", f"{inner}{{{low % _SHORT}}}"] if low else []
    if high is None:
        return " ".join([*before, f"{inner}*"])
    whole, rest = divmod(high - low, _SHORT)
    most = f"{short}{{{whole}}} {inner}{{0,{rest}}}" if whole else f"{inner}{{0,{rest}}}"
    fewer = [f"{short}{{0,{whole - 1}}} {inner}{{0,{_SHORT - 1}}}"] if whole else []
    return " ".join([*before, _either([*fewer, most])])


def shortened(grammar: str) -> str:
    """A grammar as xgrammar prints it, with its long repetitions made as `repeated` makes them."""

    def short(found: re.Match[str]) -> str:
        rule, low, high = found.groups()
        return found[0] if rule is None else f"({repeated(rule, int(low), None if high == '-1' else int(high))})"

    return _REPETITION.sub(short, grammar)


_REPETITION = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|(\w+)\{(\d+), (-?\d+)\}')
"""A repetition of a rule; or a text or a class, which may hold the like."""

_SHORT = 64
"""Longest repetition that is one; xgrammar handles those beyond 128 in another, slower way."""

_LONG = 4096
"""Most characters of what is repeated in pieces."""


def _either(branches: Iterable[str]) -> str:
    return f"({' | '.join(branches)})"


def _sequence(items: Iterable[Any]) -> str:
    return " ".join(_item(*one) for one in items) or '""'


def _item(kind: Any, value: Any) -> str:
    if kind in (code.MAX_REPEAT, code.MIN_REPEAT):
        low, high, inner = value
        return repeated(f"({_sequence(inner)})", low, None if high is code.MAXREPEAT else high)
    if kind is code.SUBPATTERN:
        _, added, removed, inner = value
        if added or removed:
            raise ValueError("flags")
        return f"({_sequence(inner)})"
    if kind is code.BRANCH:
        return _either(_sequence(one) for one in value[1])
    if kind is code.AT:
        raise ValueError("an anchor inside it")
    if kind in (code.LITERAL, code.NOT_LITERAL, code.ANY, code.IN):
        return _characters(_ranges(kind, value))
    raise ValueError(f"{str(kind).lower().replace('_', ' ')}s")


def _ranges(kind: Any, value: Any) -> list[tuple[int, int]]:
    """The characters of a class."""
    if kind is code.LITERAL:
        return [(value, value)]
    if kind is code.RANGE:
        return [value]
    if kind is code.NOT_LITERAL:
        return _rest([(value, value)])
    if kind is code.ANY:
        return _rest(_LINE_ENDS)
    if kind is code.CATEGORY:
        return list(_CATEGORIES[value]) if value in _CATEGORIES else _rest(_OTHERS[value])
    negated = value[0][0] is code.NEGATE
    found = [one for part in value[negated:] for one in _ranges(*part)]
    return _rest(found) if negated else found


def _rest(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """All characters but these."""
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    return [*found, (start, _LAST)] if start <= _LAST else found


def _characters(ranges: list[tuple[int, int]]) -> str:
    """A class as EBNF: what stands in a JSON string as it is, or as an escape."""
    others = _rest(ranges)
    plain = _rest([*others, (0, 0x1F), *((one, one) for one in _ESCAPES), _HALVES])
    escapes = [to for one, to in _ESCAPES.items() if any(low <= one <= high for low, high in ranges)]
    found = [
        "[" + "".join(_character(low) + (f"-{_character(high)}" if high > low else "") for low, high in plain) + "]"
    ]
    found = [*(found if plain else []), *([f'"\\\\" [{"".join(escapes)}]'] if escapes else [])]
    if not found:
        raise ValueError("a class of characters that JSON cannot hold")
    return f"({' | '.join(found)})"


def _character(one: int) -> str:
    return f"\\u{one:04x}" if one <= 0xFFFF else f"\\U{one:08x}"


RULES = f"{CHARACTER} ::= {_characters([(0, _LAST)])}\n"
