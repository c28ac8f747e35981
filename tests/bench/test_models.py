"""The table of models is of all architectures, and what it says of one is measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from bench import bases, models, scores

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
    assert found["mixtral"]["served"] == f"{models.REFERENCE}; vLLM: not tried"
    assert found["t5"]["seconds"] < 5
    before, after = rows(PAGE), rows(page)
    assert after["t5"] == before["t5"]
    assert after["mixtral"].split("|")[1:5] == before["mixtral"].split("|")[1:5]


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "ARCHITECTURES", {name: {} for name in ("a", "b", "c")})
    asked: list[str] = []

    def measure(name: str, *_: object) -> dict[str, object]:
        asked.append(name)
        if asked == ["a", "b"]:
            raise KeyboardInterrupt
        return {"refused": f"{name} {len(asked)}", "seconds": 0}

    monkeypatch.setattr(models, "measure", measure)
    page, out = tmp_path / "models.md", tmp_path / "models.json"
    page.write_text("|a|\n|---|\n")
    with pytest.raises(KeyboardInterrupt):
        models.run(out, page, Console(quiet=True))
    assert list(rows(page)) == ["a"]
    models.run(out, page, Console(quiet=True))
    models.run(out, page, Console(quiet=True), names=["a"])
    assert asked == ["a", "b", "b", "c", "a"]
    assert [row.split("|")[2].strip() for row in rows(page).values()] == [
        "refused: a 5",
        "refused: b 3",
        "refused: c 4",
    ]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("INFO loading\nNotImplementedError: No MoE backend fits (weight_key=1)\n", "No MoE backend fits"),
        (
            "ValidationError: 1 error\n  Value error, X is not supported. Use Y [type=a]\n",
            "X is not supported",
        ),
        ("ValueError: a|b\nRuntimeError: Engine core failed\n", "a\\|b"),
        ("", "it ended without a word"),
    ],
)
def test_a_reason_is_the_last_error_without_details(said: str, reason: str) -> None:
    assert scores.reason(said) == reason
