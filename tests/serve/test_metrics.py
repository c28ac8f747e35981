"""A server's log: what it says of a prediction, and what it keeps to itself."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cogpress.config import Serve
from cogpress.serve.metrics import Observer


@pytest.mark.parametrize(
    ("given", "error", "logged"),
    [
        ({"prompt": "hi", "seed": 2.5}, "seed is 2.5; it must be whole.", "seed is 2.5; it must be whole."),
        ({"json_schema": "{]"}, "json_schema is not JSON: line 1 {]", "json_schema is not JSON"),
        ({"adapter": "Ada Lovelace"}, "There is no adapter 'Ada Lovelace'.", "There is no adapter"),
        ({"tools": '[{"name": "pay\\nBob"}]'}, "Message 1: the arguments of pay\nBob must be", "Message 1"),
        ({"tools": '[{"name": "pay\\nBob"}]'}, "The arguments of pay\nBob must be", "The arguments of …\n… must be"),
        ({"fields": {"Zoë": 1}}, "This model has no input zoë; it has", "This model has no input …; it has"),
        ({"prompt": "a b " * 50_000}, "The prompt is 100000 tokens long", "…"),
        ({"prompt": "The secret"}, "The template's fields are missing.", "… template's fields are missing."),
    ],
)  # fmt: skip
def test_an_error_is_logged_without_what_was_typed(
    given: dict[str, Any], error: str, logged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Observer(Serve(log="requests")).refused(given, error)
    assert json.loads(capsys.readouterr().err)["error"] == logged
    Observer(Serve(log="prompts")).refused(given, error)
    assert json.loads(capsys.readouterr().err)["error"] == error
