"""The verification report as programs and people read it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from cogpress import config
from cogpress.verify import limits, report
from cogpress.verify.distributions import Scored
from cogpress.verify.forgotten import ByHeart, General
from cogpress.verify.report import Check, Verdict
from cogpress.verify.run import _by_heart, _forgotten, _score_check
from cogpress.weights.filenames import VERIFICATION, VERIFICATION_PAGE


def verdict(folder: Path, *checks: Check) -> Verdict:
    facts = {"source": "the test"}
    return Verdict(folder, "none", list(checks), {"score": 0.0}, "abc", facts, 64, "vllm")


def test_what_cannot_be_concluded_is_no_pass_and_no_failure(tmp_path: Path) -> None:
    checks = [
        Check("merge", 0.0, 0.003, passed=True),
        Check("score below the reference", 0.0, 0.02, passed=True, cause="Train longer.", conclusive=False),
    ]
    found = verdict(tmp_path, *checks)
    assert found.passed
    assert (found.causes, found.doubts) == ([], ["Train longer."])
    console = Console(file=io.StringIO(), width=80)
    console.print(found.table())
    [line] = [one for one in console.file.getvalue().splitlines() if "score" in one]  # type: ignore[attr-defined]
    assert "?" in line
    assert "✓" not in line
    report.write(found, {})
    content = json.loads((tmp_path / VERIFICATION).read_text())
    assert [check.get("conclusive", True) for check in content["checks"]] == [True, False]
    assert content["doubts"] == ["Train longer."]
    page = (tmp_path / VERIFICATION_PAGE).read_text()
    assert "| ? | score below the reference |" in page
    assert "- Train longer." in page


@pytest.mark.parametrize(
    ("right", "reference", "mark"), [(0.9, 0.9, "✓"), (1.0, 0.9, "✓"), (0.8, 0.9, "✗"), (0.0, 0.9, "✗"), (0, 0, "?")]
)
def test_the_score_is_compared_where_there_is_one(right: float, reference: float, mark: str) -> None:
    check = _score_check(right, reference, 0.02, "Merge again.")
    assert not _score_check(0.0, 0.01, 0.02, "Merge again.").passed, "nothing right is no small loss"
    assert check.mark == mark
    assert ("nothing can be concluded" in check.cause) == (mark == "?")


def test_a_failure_is_one_whatever_can_be_concluded(tmp_path: Path) -> None:
    found = verdict(tmp_path, Check("merge", 1.0, 0.003, passed=False, cause="Merge again."))
    assert not found.passed
    assert (found.checks[0].mark, found.causes, found.doubts) == ("✗", ["Merge again."], [])


FINE = General(60.0, 30.0, 0.7, ["An answer."] * 12, ["Another answer."] * 12, 50_000)


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        (FINE, []),
        (replace(FINE, perplexity=300.0), ["perplexity of general text, times the base's"]),
        (replace(FINE, perplexity=float("nan")), ["perplexity of general text, times the base's"]),
        (replace(FINE, kl=2.5), ["KL to the base on general text"]),
        (replace(FINE, kl=float("nan")), ["KL to the base on general text"]),
        (replace(FINE, answers=[""] * 4 + ["An answer."] * 8), ["plain instructions answered worse than by the base"]),
        (replace(FINE, answers=[""] * 4 + ["One."] * 8, base_answers=[""] * 3 + ["One."] * 9), []),
    ],
)
def test_weights_that_forgot_what_the_base_knows_fail(found: General, wrong: list[str]) -> None:
    metrics: dict[str, float] = {}
    checks = _forgotten(found, limits.of(config.Config().verify, "none"), metrics)
    assert [check.name for check in checks if not check.passed] == wrong
    assert metrics["base_general_perplexity"] == 30.0
    assert all("forgot" in check.cause for check in checks)


def test_a_base_that_knows_nothing_has_nothing_to_forget() -> None:
    found = replace(FINE, perplexity=40_000.0, base_perplexity=40_000.0, answers=[""] * 12)
    checks = _forgotten(found, limits.of(config.Config().verify, "none"), {})
    assert "".join(check.mark for check in checks) == "✓✓?"


@pytest.mark.parametrize(
    ("lines", "held", "right", "marks"),
    [
        (0, 0, 1.0, "✓✓"),
        (20, 20, 1.0, "✓✓"),  # lines that all begin and go on alike
        (20, 0, 1.0, "✗✓"),
        (0, 0, 0.2, "✓✗"),
    ],
)
def test_weights_that_know_their_training_by_heart_fail(lines: int, held: int, right: float, marks: str) -> None:
    found = ByHeart([True] * lines + [False] * (64 - lines), [True] * held + [False] * (64 - held), 1.0)
    scored = [Scored([-0.1], [number < 64 * right]) for number in range(64)]
    metrics: dict[str, float] = {}
    limit = limits.of(config.Config().verify, "none")
    checks = _by_heart(found, scored, limit, metrics)
    assert "".join(check.mark for check in checks) == marks
    assert metrics["memorized_lines"] == lines
    few = _by_heart(replace(found, held_out=[False]), scored[:4], limit, metrics)
    assert [check.mark for check in few] == ["?", "?"], "four held-out examples prove nothing"
    unknown = _by_heart(None, scored, limit, {})  # a run that has not kept any of its examples
    assert [(check.name, check.mark) for check in unknown] == [(check.name, "?") for check in checks]


def test_the_report_shows_what_was_measured_beside_the_task(tmp_path: Path) -> None:
    found = replace(verdict(tmp_path), general=replace(FINE, answers=["A `b`\nc."] * 12))
    report.write(found, {})
    content = json.loads((tmp_path / VERIFICATION).read_text())
    assert content["general"]["measured"]["perplexity of general text"] == {"base": 30.0, "weights": 60.0}
    assert content["general"]["instructions"][0]["weights"] == "A `b`\nc."
    page = (tmp_path / VERIFICATION_PAGE).read_text()
    assert "| perplexity of general text | 30 | 60 |" in page
    assert "  - weights: `A 'b' c.`" in page
    console = Console(file=io.StringIO(), width=80)
    console.print(*found.tables())
    assert "perplexity of general text" in console.file.getvalue()  # type: ignore[attr-defined]
