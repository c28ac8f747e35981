"""A draft's table: names that no training answer has are drafted, and no draft reaches further than it pays."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cogpress.draft import file, proposer
from cogpress.draft.symbols import NAME, NUMBER, START, Alphabet, Answer
from cogpress.draft.table import LONGEST, Table, answers, build
from cogpress.errors import CogpressError
from cogpress.prompts import Row

WORDS = [
    "<end>",
    "\n",
    "ask",
    " ",
    "columns",
    ":",
    "sum",
    " of",
    " by",
    '{"',
    '":"',
    '","',
    '"}',
    "group",
    ".",
    "0",
    "1",
]
PARTS = [f"{letter}{number}x" for letter in "abcdefgh" for number in range(8)]
TEXTS = [*WORDS, *PARTS, *(f" {part}" for part in PARTS)]
IDS = {text: at for at, text in enumerate(TEXTS)}
ALPHABET = Alphabet.of(TEXTS, [0])
END = IDS["<end>"]


def ids(*texts: str) -> list[int]:
    return [IDS[text] for text in texts]


def example(one: str, other: str, tail: str, others: list[str]) -> tuple[list[int], list[int]]:
    """`sum of ONE.TAIL by OTHER.TAIL` and a list of names; the answer has both names, in this order."""
    question = ids("ask", "sum", " of", f" {one}", ".", tail, " by", f" {other}", ".", tail, "\n", "columns", ":", "\n")
    lines = [one, *others, other]
    random.Random(one).shuffle(lines)
    for name in lines:
        question += ids(name, ".", tail, "\n")
    answer = ids('{"', "sum", '":"', one, ".", tail, '","', "group", '":"', other, ".", tail, '"}', "<end>")
    return [*question, *ids("ask", ":")], answer


def examples(parts: list[str], count: int = 40) -> list[tuple[list[int], list[int]]]:
    found = []
    for seed in range(count):
        one, other, tail, *others = random.Random(seed).sample(parts, 6)
        found.append(example(one, other, tail, others))
    return found


@pytest.fixture(scope="module")
def table() -> Table:
    return build(examples(PARTS[:32]), ALPHABET, [END])


def made(table: Table, longest: int = 512) -> proposer.Proposer:
    """A proposer as vLLM's engine makes it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, path = Path(folder) / "tokenizer.json", Path(folder) / file.NAME
        tokenizer.write_text("{}")
        file.write(path, table, tokenizer=tokenizer, adapter="")
        config: Any = SimpleNamespace(
            additional_config={proposer.OPTION: str(path)}, model_config=SimpleNamespace(max_model_len=longest)
        )
        one = proposer.Proposer(config)
    one._steps = proposer.StepCost(lambda: 0.0)  # no time passes, so nothing is measured
    return one


def steps(table: Table, asked: list[tuple[list[int], list[int]]], *, wrong: bool = False) -> tuple[int, int, int]:
    """Answer as an engine does: it takes what is right of each draft. Steps, tokens, and tokens drafted."""
    one = made(table)
    width = max(len(prompt) + len(answer) for prompt, answer in asked) + proposer.MOST + 1
    buffer = np.zeros((len(asked), width), np.int32)
    lengths = np.array([len(prompt) for prompt, _ in asked], np.int32)
    for row, (prompt, _) in enumerate(asked):
        buffer[row, : len(prompt)] = prompt
    places = [0] * len(asked)
    drafts: list[list[int]] = [[] for _ in asked]
    order = list(range(len(asked)))
    count = drafted = 0
    while order:
        sampled = []
        for row in order:
            answer, at = asked[row][1], places[row]
            right = 0
            while right < len(drafts[row]) and drafts[row][right : right + 1] == answer[at + right : at + right + 1]:
                right += 1
            took = answer[at : at + right + 1]
            buffer[row, lengths[row] : lengths[row] + len(took)] = took
            lengths[row] += len(took)
            places[row] += len(took)
            sampled.append(took)
            count += 1
            drafted += len(drafts[row])
        keep = [at for at, row in enumerate(order) if places[row] < len(asked[row][1])]
        sampled = [sampled[at] for at in keep]
        order = [order[at] for at in keep]
        if len(order) > 2:  # rows move between steps as requests come and go
            order, sampled = [*order[1:], order[0]], [*sampled[1:], sampled[0]]
        found = one.propose(sampled, lengths[order], buffer[order])
        for row, draft in zip(order, found, strict=True):
            drafts[row] = draft
    return count, sum(len(answer) for _, answer in asked), drafted


def test_an_answer_becomes_symbols() -> None:
    prompt, answer = example("a1x", "b2x", "c3x", ["d4x"])
    read = Answer([*prompt, *ids("1", "0", ":")], ALPHABET)
    for token in [*answer, *ids("1", "0", "group")]:
        read.push(token)
    names = [START, *ids('{"', "sum", '":"'), NAME, *ids('","', "group", '":"'), NAME, *ids('"}', "<end>")]
    assert read.symbols == [*names, NUMBER, *ids("group")]
    assert sum(read.sizes) == len(answer) + 3


def test_what_begins_like_a_name_and_is_none_stays_as_it_is() -> None:
    prompt, _ = example("a1x", "b2x", "c3x", [])
    read = Answer(prompt, ALPHABET)
    for token in ids("a1x", "b2x", ".", "a1x", ".", "c3x"):
        read.push(token)
    assert read.symbols == [START, *ids("a1x", "b2x", "."), NAME]


def test_names_that_no_training_answer_has_are_drafted(table: Table) -> None:
    unseen = examples(PARTS[32:], 12)
    count, tokens, drafted = steps(table, unseen[:1])
    assert tokens / count > 4, "of 14 tokens, the first comes with the prompt"
    count, tokens, drafted = steps(table, unseen)
    assert tokens / count > 2.5, "fewer at once, where each costs more"
    assert (tokens - count) / drafted > 0.9


def test_drafts_end_with_the_answer_and_the_context(table: Table) -> None:
    prompt, answer = example("a1x", "b2x", "c3x", [])
    buffer = np.array([[*prompt, *answer, 0, 0, 0, 0]], np.int32)
    length = len(prompt) + len(answer) - 3
    [draft] = made(table).propose([answer[-4:-3]], np.array([length]), buffer)
    assert draft == answer[-3:], "nothing after its end"
    [draft] = made(table, length + 3).propose([answer[-4:-3]], np.array([length]), buffer)
    assert draft == answer[-3:-1]
    assert made(table, length + 1).propose([answer[-4:-3]], np.array([length]), buffer) == [[]]


def test_prefill_is_left_alone(table: Table) -> None:
    prompt, _ = example("a1x", "b2x", "c3x", [])
    assert made(table).propose([[]], np.array([5]), np.array([prompt], np.int32)) == [[]]


def test_where_a_context_leaves_it_open_a_word_of_the_prompt_decides() -> None:
    """A third of the answers is `sum`; the other prompts have a word that says otherwise, among names that do not."""
    rows = []
    for seed in range(60):
        others = random.Random(seed).sample(PARTS, 3)
        kind = ("group", "columns", "")[seed % 3]
        prompt = ids("ask", *others, *([kind] if kind else []), "ask", ":")
        rows.append((prompt, ids('{"', kind or "sum", '"}', "<end>")))
    built = build(rows, ALPHABET, [END])
    begun = [START, *ids('{"')]
    guess = replace(built, rules={}).predict(begun)
    assert guess is not None
    assert guess[1] < 0.5
    for word, follows in (("group", "group"), ("columns", "columns"), (" of", "sum")):
        found = built.predict(begun, frozenset(ids(word, *PARTS[:3])))
        assert found is not None
        assert found[0] == IDS[follows]
        assert found[1] > 0.9


def test_requests_with_a_seed_have_no_draft(table: Table) -> None:
    """Their random numbers must not depend on how much was drafted, which depends on the load."""
    prompt, answer = example("a1x", "b2x", "c3x", [])
    one = made(table)
    generators: dict[int, None] = {}
    one.attach(SimpleNamespace(input_batch=SimpleNamespace(generators=generators)))
    asked = [answer[:1]] * 2, np.array([len(prompt) + 1] * 2), np.array([[*prompt, *answer]] * 2, np.int32)
    assert all(one.propose(*asked))
    generators[0] = None
    first, second = one.propose(*asked)
    assert (first, bool(second)) == ([], True)


def test_a_fault_costs_the_draft_and_not_the_engine(table: Table, caplog: pytest.LogCaptureFixture) -> None:
    prompt, answer = example("a1x", "b2x", "c3x", [])
    one = made(table)
    buffer = np.array([[*prompt, *answer]], np.int32)
    assert one.propose([answer[:1]], np.array([len(prompt) + 1]), buffer) != [[]]
    assert one.propose([answer[:1]], None, buffer) == [[]]  # type: ignore[arg-type]
    assert "is off until the next start" in caplog.text
    assert one.propose([answer[:1]], np.array([len(prompt) + 1]), buffer) == [[]]


def test_drafts_that_are_not_taken_cease(table: Table) -> None:
    """Prompts that look like the task's and are answered otherwise."""
    noise = random.Random(0)
    other = [(prompt, noise.choices(ids(*PARTS), k=120)) for prompt, _ in examples(PARTS[32:], 4)]
    _, tokens, drafted = steps(table, other)
    assert drafted < 0.3 * tokens


@pytest.mark.parametrize(
    ("fixed", "token", "rows", "least"),
    [
        (0.03, 0.00001, 1, 0.05),
        (0.03, 0.00001, 64, 0.05),
        (0.09, 0.01, 1, 0.25),
        (0.09, 0.01, 16, 0.75),
        (0, 0.01, 4, 0.8),
    ],
)
def test_what_pays_follows_from_what_a_token_costs(fixed: float, token: float, rows: int, least: float) -> None:
    """Steps of a GPU, where more tokens cost next to nothing, and of a CPU, where they do."""
    now = 0.0
    cost = proposer.StepCost(lambda: now)
    random_ = random.Random(0)
    found = cost.least(rows, rows)
    for _ in range(60):
        drafted = random_.randrange(4) * rows
        cost.begins(rows, drafted, complete=True)
        now += fixed + token * (rows + drafted)
        found = cost.least(rows, rows + drafted * 2 // 3)
    assert found == pytest.approx(least, abs=0.12)
    now += 60
    assert cost.least(rows, rows) == found, "a pause is no step"


def test_a_table_is_written_and_mapped(table: Table, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    path = file.path_in(tmp_path)
    file.write(path, table, tokenizer=tmp_path / "tokenizer.json", adapter="one")
    read = file.read(path)
    for name in ("keys", "symbols", "shares"):
        assert np.array_equal(getattr(read, name), getattr(table, name))
        assert isinstance(getattr(read, name), np.memmap)
    assert (read.tail, read.ends) == (table.tail, table.ends)
    assert read.rules == {
        context: [(word, symbol, pytest.approx(share)) for word, symbol, share in rules]
        for context, rules in table.rules.items()
    }
    assert table.tail == tuple(ids("\n", "ask", ":"))[-len(table.tail) :]
    unseen = examples(PARTS[32:], 3)
    assert steps(read, unseen) == steps(table, unseen)
    assert file.check(tmp_path, "one") == file.check(tmp_path, None) == path
    assert file.fitting((tmp_path / "none", tmp_path), "one") == path.parent
    assert file.fitting((tmp_path,), "other") is None
    with pytest.raises(CogpressError, match="another training"):
        file.check(tmp_path, "other")
    (tmp_path / "tokenizer.json").write_text("{ }")
    with pytest.raises(CogpressError, match="another tokenizer"):
        file.check(tmp_path, "one")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_damaged_table_is_said(table: Table, tmp_path: Path, size: int) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    path = file.path_in(tmp_path)
    file.write(path, table, tokenizer=tmp_path / "tokenizer.json", adapter="one")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CogpressError, match=r"table\.safetensors"):
        file.read(path)


def test_answers_are_what_is_learnt_after_a_prompt() -> None:
    two_turns = Row([1, 2, 3, 4, 5, 6], [-100, 2, -100, -100, 5, 6])
    plain = Row([1, 2, 3], [1, 2, 3])
    assert list(answers([two_turns, plain])) == [([1], [2]), ([1, 2, 3, 4], [5, 6])]


def test_an_empty_training_makes_an_empty_table() -> None:
    empty = build([], ALPHABET)
    assert empty.predict([START]) is None
    assert made(empty).propose([[3]], np.array([4]), np.array([[5, 6, 7, 3]], np.int32)) == [[]]


@pytest.mark.parametrize("length", range(1, LONGEST + 2))
def test_answers_of_any_length_make_a_table(length: int) -> None:
    """Such as the names of classes, of a token or two."""
    words = ids("group", "sum", " by", " of", "ask", "columns", " ", "\n")
    answer = [*words[: length - 1], END]
    made_of = build([(ids("ask", ":"), answer)] * 8, ALPHABET, [END])
    found = made_of.predict([START])
    assert found is not None
    assert found[0] == answer[0]


def test_entries_are_bounded_by_how_often_they_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    from cogpress.draft import table as module

    monkeypatch.setattr(module, "ENTRIES", 20)
    small = build(examples(PARTS), ALPHABET, [END])
    assert len(small.keys) == 20
    assert small.predict([START]) == (IDS['{"'], pytest.approx(1, abs=0.02))
    assert LONGEST == 8


def test_the_named_class_is_there() -> None:
    from cogpress.engines import vllm

    module, _, name = vllm.DRAFTS.rpartition(".")
    found: Any = __import__(module, fromlist=[name])
    assert callable(getattr(found, name).propose)
