"""The table of models is of all architectures, and what it says of one is measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bench import bases, models

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def rows(page: Path) -> dict[str, str]:
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {line.split("`")[1]: line for line in lines}


def test_the_page_has_every_architecture() -> None:
    found = rows(PAGE)
    assert list(found) == list(bases.ARCHITECTURES)
    assert sum("refused" not in row for row in found.values()) >= 24


@pytest.mark.train
def test_the_page_is_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("mixtral", "t5")
    monkeypatch.setattr(bases, "ARCHITECTURES", {name: bases.ARCHITECTURES[name] for name in names})
    page = tmp_path / "models.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    found = models.run(tmp_path / "models.json", page, Console(quiet=True))
    assert found["mixtral"]["kl"] < 1e-5
    assert found["mixtral"]["served"] is True
    assert found["t5"]["seconds"] < 5
    before, after = rows(PAGE), rows(page)
    assert after["t5"] == before["t5"]
    assert after["mixtral"].split("|")[1:4] == before["mixtral"].split("|")[1:4]
