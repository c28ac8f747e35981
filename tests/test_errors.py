"""Why something failed is said in words."""

from __future__ import annotations

import subprocess

import pytest

from cogpress.errors import reason


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (subprocess.TimeoutExpired(["cog", "--token", "secret"], 3), "no answer in time"),
        (TimeoutError(), "no answer in time"),
        (MemoryError(), "too little memory"),
        (EOFError(), "it ends too early"),
        (PermissionError(13, "Permission denied", "/a/path"), "Permission denied"),
        (ValueError("first line\nsecond"), "first line"),
        (ArithmeticError(), "no reason was given"),
    ],
)
def test_a_reason_has_no_class_name(error: Exception, said: str) -> None:
    assert reason(error) == said
