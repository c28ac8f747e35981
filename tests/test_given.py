"""JSON from outside: what is taken can be written again, and costs the server little."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cogpress import given

LIMIT = given.MAX_VALUES


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NaN", "NaN is not allowed"),
        ('{"a": -Infinity}', "-Infinity is not allowed"),
        ('{"a": [1e999]}', "1e999 is too large a number"),
        ("1" * 5000, "5,000 digits is too long"),
        ("[" * 102 + "]" * 102, "nested more than 100 levels"),
        ("[" * 90_000 + "]" * 90_000, "nested more than 100 levels"),
        (f"[{'[],' * LIMIT}1]", "more than 100,000 values"),
        (json.dumps({f'"{number}': "," for number in range(LIMIT // 2 + 2)}), "more than 100,000 values"),
        (f"[{'1,' * LIMIT}", "more than 100,000 values"),
        ('{"a": "', "Unterminated"),
    ],
)
def test_what_is_no_json_or_too_much_is_refused(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        given.parse(text)


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": 'a "quoted" [list], with \\ and: ' * LIMIT},
        {"rows": ["1,2,3\n" * LIMIT, "\\"]},
        [0] * (LIMIT - 1),
        {str(number): number for number in range(LIMIT // 2 - 1)},
        {"a": 1.5, "b": -1e308, "c": 10**400, "d": None},
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_in_texts_is_not_counted(value: Any) -> None:
    assert given.parse(json.dumps(value)) == value


def test_half_characters_are_replaced() -> None:
    assert given.parse('{"\\ud83d": "\\ud83d\\ude00 \\ude00"}') == {"\ufffd": "\U0001f600 \ufffd"}
