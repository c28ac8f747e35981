"""The verification report as programs and people read it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from cogpress import config
from cogpress.files import write_json
from cogpress.merge import general
from cogpress.verify import limits, report
from cogpress.verify.report import Check, Verdict
from cogpress.verify.run import _forgotten, _score_check
from cogpress.weights import manifest
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


@pytest.mark.parametrize(("perplexity", "passes"), [(60.0, True), (300.0, False), (float("nan"), False)])
def test_weights_that_forgot_what_the_base_knows_fail(
    perplexity: float, passes: bool, tmp_path: Path, tiny_base: Path
) -> None:
    rows = general.rows([[5, 6, 7]])
    text = hashlib.sha256(b"[[5, 6, 7]]").hexdigest()
    write_json(tmp_path / f"{manifest.fingerprint(tiny_base)}.json", {text: 30.0})
    limit = limits.of(config.Config().verify, "none")
    case = SimpleNamespace(base=tiny_base, general=rows, cache=tmp_path, limits=limit, pad=0)
    metrics: dict[str, float] = {}
    check = _forgotten(case, perplexity, metrics)  # type: ignore[arg-type]
    assert check.passed is passes
    assert metrics["base_general_perplexity"] == 30.0
    assert "forgot" in check.cause
