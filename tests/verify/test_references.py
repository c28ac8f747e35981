"""What the reference answered is kept by prompt."""

from __future__ import annotations

from pathlib import Path

from cogpress.verify import references


def test_only_answers_of_the_reference_to_the_same_question_count(tmp_path: Path) -> None:
    first, second, other = [1, 2], [3], [4]
    references.keep(tmp_path, "adapter", [first, second], ["one", "two"], 8)
    references.keep(tmp_path, "adapter", [other], ["other"], 16)
    assert references.kept(tmp_path, "adapter", [second, [5], other, first]) == ["two", None, "other", "one"]
    assert references.kept(tmp_path, "adapter", [first, other], 16) == [None, "other"]
    assert references.kept(tmp_path, "another", [first]) == [None]
    references.keep(tmp_path, "another", [first], ["new"], 8)
    assert references.kept(tmp_path, "another", [first, second]) == ["new", None]
