"""What is known already is not computed again, and gives the same figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cogpress.prompts import Row
from cogpress.verify import distributions, parity

PROMPT, ANSWER = [5, 6, 7], [8, 9, 10]
ROW = Row(PROMPT + ANSWER, [-100] * 3 + ANSWER)


def test_an_expected_answer_is_all_that_is_learnt() -> None:
    assert parity.expected_answer(PROMPT, ROW) == ANSWER
    assert parity.expected_answer(PROMPT, Row([*ROW.input_ids, 11], [*ROW.labels, -100])) == ANSWER
    assert parity.expected_answer([5, 6], ROW) == []
    assert parity.expected_answer([5, 6, 4], ROW) == []
    earlier = Row(ROW.input_ids, [-100, 6, -100, *ANSWER])
    assert parity.expected_answer(PROMPT, earlier) == [], "an earlier turn is learnt, too"


@pytest.mark.train
def test_what_is_known_of_the_rows_changes_no_figure(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = distributions.merged_model(tiny_base)
    other = Row([1, 2, 3, 4, 12, 13], [-100] * 4 + [12, 13])
    rows = [ROW, other]
    answers = [parity.Answer("", ANSWER, [-1.0, -2.0, -3.0]), parity.Answer("", [20, 21], [-4.0, -5.0])]
    served = parity.Served(answers, [[-1.0, -2.0, -3.0], [-6.0, -7.0]], 0.0, 0.0, 0.0)
    asked = [PROMPT, [1, 2, 3, 4]]
    scored = distributions.score(model, rows, 0)
    plain = parity.compare(lambda: model, asked, rows, served, 0)
    computed: list[int] = []
    real = distributions.score

    def score(model: Any, rows: list[Row], pad: int) -> list[distributions.Scored]:
        computed.append(len(rows))
        return real(model, rows, pad)

    monkeypatch.setattr(distributions, "score", score)
    known = parity.compare(lambda: model, asked, rows, served, 0, scored)
    assert computed == [1], "the answer that is not the expected one"
    assert replace(known, points=[]) == replace(plain, points=[])
    assert sorted(theirs for theirs, _ in known.points) == [-7, -6, -5, -4, -3, -2, -1]
    assert known.tokens == 7
    by_hand = [real(model, [Row(asked[1] + [20, 21], [-100] * 4 + [20, 21])], 0)[0], *scored]
    expected = sorted(value for one in by_hand for value in one.logprobs)
    assert sorted(ours for _, ours in known.points) == pytest.approx(expected, abs=1e-3)


def test_an_answer_that_a_draft_changed_is_counted_and_a_tie_is_not() -> None:
    plain = [parity.Answer("", [1, 2, 3], [-0.1, -0.2, -0.3])] * 5
    drafted = [
        plain[0],
        parity.Answer("", [1, 9, 3], [-0.1, -0.21, -0.5]),  # as likely as the other
        parity.Answer("", [1, 9, 3], [-0.1, -0.9, -0.3]),
        parity.Answer("", [1, 2], [-0.1, -0.2]),
        parity.Answer("", [1, 2, 3, 4], [-0.1, -0.2, -0.3, -0.1]),
    ]
    assert parity.changed(drafted, plain, 0.03) == 3
