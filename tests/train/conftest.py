"""Rows to train on in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cogpress import config
from cogpress.data import prepare


@pytest.fixture
def short(examples_file: Path, tokenizer: Any) -> prepare.Prepared:
    """Forty short examples, four of them held out."""
    return prepare.prepare(
        examples_file,
        tokenizer=tokenizer,
        prompt=config.Prompt(),
        data=config.Data(validation_share=0.1),
        max_length=128,
        seed=0,
    )
