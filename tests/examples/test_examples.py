"""The worked example's questions, queries and scorer."""

from __future__ import annotations

import collections
import copy
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped, unused-ignore]
import pytest

from examples import columns, queries, questions

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "test")
ROWS = {split: questions.generate(2000, split) for split in SPLITS}
ANSWERS: dict[str, list[Any]] = {split: [json.loads(row["answer"]) for row in ROWS[split]] for split in SPLITS}
VALIDATOR = jsonschema.Draft202012Validator(queries.QUERY_SCHEMA)


def combinations(query: dict[str, Any]) -> set[tuple[str, str, bool]]:
    ops = [calculation["op"] for calculation in query["calculations"]]
    return questions.combinations(ops, [each["op"] for each in query.get("filters", [])], "orders" in query)


def columns_of(query: dict[str, Any]) -> set[str]:
    parts = [*query["calculations"], *query.get("filters", []), *query.get("orders", [])]
    return {part["column"] for part in parts if "column" in part} | set(query.get("breakdowns", []))


def names(split: str) -> set[str]:
    return {column.name for column in columns.COLUMNS[split]}


# -- generate ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_same_arguments_give_the_same_bytes_in_any_process() -> None:
    program = (
        "import json; from examples import questions; "
        "print(json.dumps([questions.generate(50, split, 3) for split in ('train', 'test')]))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "1", "random")
    }
    assert outputs == {json.dumps([questions.generate(50, split, 3) for split in SPLITS]) + "\n"}


def test_seed_and_count() -> None:
    assert questions.generate(20, "train") == ROWS["train"][:20]
    assert questions.generate(20, "train", seed=1) != ROWS["train"][:20]
    assert questions.generate(0, "test") == []


@pytest.mark.parametrize(("count", "split"), [(1, "validation"), (1, ""), (-1, "train")])
def test_wrong_arguments(count: int, split: str) -> None:
    with pytest.raises(ValueError, match=r"split|count"):
        questions.generate(count, split)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_no_pair_is_repeated_within_or_across_splits(seed: int) -> None:
    rows = [row for split in SPLITS for row in questions.generate(1000, split, seed)]
    assert len({(row["question"], *sorted(row["columns"])) for row in rows}) == len(rows)


@pytest.mark.parametrize(("split", "least"), [("train", 120), ("test", 50)])
def test_columns_are_many_and_each_is_there_once(split: str, least: int) -> None:
    assert len(names(split)) == len(columns.COLUMNS[split]) >= least


def test_test_columns_are_new_names_in_new_namespaces() -> None:
    words = {word for name in names("train") for word in re.split(r"[._]", name)}
    assert not names("train") & names("test")
    assert not {name.split(".")[0] for name in names("train")} & {name.split(".")[0] for name in names("test")}
    assert [name for name in names("test") if set(re.split(r"[._]", name)) <= words] == []


def test_filter_values_differ_between_splits() -> None:
    values = {split: {v for c in columns.COLUMNS[split] if c.kind != "flag" for v in c.values} for split in SPLITS}
    assert not values["train"] & values["test"]


def test_rows_use_only_columns_of_their_split() -> None:
    for split in SPLITS:
        used = {column for row in ROWS[split] for column in row["columns"]}
        assert used == names(split)


def test_train_never_shows_a_held_out_combination_and_test_often_does() -> None:
    for seed in range(3):
        rows = questions.generate(700, "train", seed)
        assert not any(combinations(json.loads(row["answer"])) & questions.HELD_OUT for row in rows)
    held_out = [combinations(query) & questions.HELD_OUT for query in ANSWERS["test"]]
    assert 0.2 < sum(map(bool, held_out)) / len(held_out) < 0.55
    assert len(set.union(*held_out)) > 0.9 * len(questions.HELD_OUT)


def test_train_shows_every_calculation_with_and_without_order_and_every_filter_op_with_both() -> None:
    seen = set.union(*map(combinations, ANSWERS["train"]))
    ordered = itertools.product(queries.OPS, (False, True))
    assert {(op, flag) for op, _, flag in seen} == set(ordered) - {("HEATMAP", True)}
    assert {(op, flag) for _, op, flag in seen} == set(itertools.product(queries.FILTER_OPS, (False, True)))


@pytest.mark.slow
@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_a_compact_query_with_keys_in_order(split: str) -> None:
    order = list(queries.QUERY_SCHEMA["properties"])
    for row, query in zip(ROWS[split], ANSWERS[split], strict=True):
        VALIDATOR.validate(query)
        assert row["answer"] == json.dumps(query, separators=(",", ":"))
        assert list(query) == [key for key in order if query.get(key)]
        assert queries.score(row["answer"], row["answer"])


@pytest.mark.parametrize("split", SPLITS)
def test_no_answer_states_a_default(split: str) -> None:
    """Otherwise an answer that forgets what was asked for would be right."""
    for query in ANSWERS[split]:
        assert all(query.get(key) != value for key, value in queries.DEFAULTS.items())
        assert len(queries.normalize(json.dumps(query)) or {}) == len(query)


@pytest.mark.parametrize("split", SPLITS)
def test_every_column_of_an_answer_is_listed_and_named_in_the_question(split: str) -> None:
    for row, query in zip(ROWS[split], ANSWERS[split], strict=True):
        assert 5 <= len(row["columns"]) <= 8
        assert len(set(row["columns"])) == len(row["columns"])
        assert columns_of(query) <= set(row["columns"])
        named = set(re.findall(r"[a-z0-9_]+(?:\.[a-z0-9_]+)+|\w+", row["question"]))
        assert columns_of(query) <= named, row["question"]
        # a name with a dot or an underscore is no ordinary word, so none of the others may be named
        assert {name for name in named & set(row["columns"]) if re.search(r"[._]", name)} <= columns_of(query)


@pytest.mark.parametrize("split", SPLITS)
def test_filter_values_and_limits_are_in_the_question(split: str) -> None:
    for row, query in zip(ROWS[split], ANSWERS[split], strict=True):
        words = row["question"].rstrip("?").replace(",", " ").split()
        for each in query.get("filters", []):
            if "value" in each:
                value = each["value"]
                assert (value if isinstance(value, str) else json.dumps(value)) in words, row
        if "limit" in query:
            assert str(query["limit"]) in words


@pytest.mark.slow
def test_a_question_has_one_answer() -> None:
    answers: dict[str, set[str]] = collections.defaultdict(set)
    for seed in range(2):
        for split in SPLITS:
            for row in questions.generate(1000, split, seed):
                answers[row["question"]].add(row["answer"])
    assert {question: found for question, found in answers.items() if len(found) > 1} == {}


@pytest.mark.parametrize("table", ["_CALCULATION", "_HOW_MANY", "_CLAUSE"])
def test_a_phrase_means_one_thing(table: str) -> None:
    phrases: dict[Any, tuple[str, ...]] = getattr(questions, table)
    meanings = collections.defaultdict(set)
    for meaning, words in phrases.items():
        for phrase in words:
            meanings[phrase].add(meaning)
    assert {phrase: found for phrase, found in meanings.items() if len(found) > 1} == {}


def test_no_filter_value_reads_as_a_phrase() -> None:
    """`is set` and `is missing` are filters of their own."""
    values = {value for split in SPLITS for column in columns.COLUMNS[split] for value in column.values}
    assert not values & {"set", "missing", "present", "absent", "not", "none", "null", "over", "under", "above"}


@pytest.mark.parametrize("split", SPLITS)
def test_every_part_of_the_language_appears_often_enough_to_be_learnt(split: str) -> None:
    seen: collections.Counter[Any] = collections.Counter()
    for query in ANSWERS[split]:
        seen.update(query.keys())
        seen.update(calculation["op"] for calculation in query["calculations"])
        seen.update(each["op"] for each in query.get("filters", []))
        seen.update(each["order"] for each in query.get("orders", []))
        seen[("breakdowns", len(query.get("breakdowns", [])))] += 1
        seen.update([query.get("time_range")])
    wanted = [*queries.QUERY_SCHEMA["properties"], *queries.OPS, *queries.FILTER_OPS, *questions._PERIODS]
    wanted += ["descending", ("breakdowns", 0), ("breakdowns", 1), ("breakdowns", 2)]
    total = len(ANSWERS[split])
    assert {key: seen[key] for key in wanted if seen[key] < 0.025 * total} == {}
    assert seen["calculations"] == total


@pytest.mark.parametrize("split", SPLITS)
def test_questions_stay_short(split: str) -> None:
    lengths = sorted(len(row["question"] + ", ".join(row["columns"]) + row["answer"]) for row in ROWS[split])
    assert sum(lengths) / len(lengths) < 350
    assert lengths[int(0.95 * len(lengths))] < 470


def test_questions_are_worded_in_many_ways() -> None:
    """Masking what varies, there are far more wordings than a table of templates would have."""
    masked = set()
    for row in ROWS["train"]:
        text = row["question"]
        for column in sorted(row["columns"], key=len, reverse=True):
            text = text.replace(column, "C")
        masked.add(text)
    assert len(masked) > 800


@pytest.mark.parametrize(
    ("word", "value"),
    [("500", 500), ("0.25", 0.25), ("true", True), ("false", False), ("web-1", "web-1"), ("null", "null")],
)
def test_literal(word: str, value: Any) -> None:
    assert questions.literal(word) == value
    assert type(questions.literal(word)) is type(value)


# -- score ------------------------------------------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "calculations": [{"op": "COUNT"}, {"op": "P95", "column": "duration_ms"}],
    "breakdowns": ["host", "region"],
    "filters": [{"column": "status", "op": ">", "value": 500}, {"column": "error", "op": "exists"}],
    "orders": [{"op": "COUNT", "order": "descending"}, {"column": "host", "order": "ascending"}],
    "limit": 5,
    "time_range": 3600,
}


def changed(**parts: Any) -> str:
    return json.dumps({**FULL, **parts})


COUNT = '{"calculations":[{"op":"COUNT"}]}'


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        (json.dumps(FULL), json.dumps(FULL, indent=2)),
        (json.dumps(FULL), json.dumps(dict(reversed(FULL.items())))),
        (json.dumps(FULL), json.dumps(FULL, sort_keys=True)),
        (json.dumps(FULL), " \t\r\n" + json.dumps(FULL) + "\n\n"),
        (json.dumps(FULL), changed(calculations=list(reversed(FULL["calculations"])))),
        (json.dumps(FULL), changed(breakdowns=["region", "host"])),
        (json.dumps(FULL), changed(filters=list(reversed(FULL["filters"])))),
        (json.dumps(FULL), changed(limit=5.0, time_range=3.6e3)),
        (json.dumps(FULL), json.dumps(FULL).replace("500", "500.0")),
        (json.dumps(FULL), json.dumps(FULL).replace("500", "5e2")),
        (json.dumps(FULL), json.dumps(FULL).replace('"host"', '"\\u0068ost"')),
        (json.dumps(FULL), json.dumps(FULL)[:-1] + ',"limit":5}'),
        (json.dumps(FULL), json.dumps(FULL)[:-1] + ',"limit":5.0}'),
        (COUNT, COUNT[:-1] + ',"breakdowns":[],"filters":[],"orders":[]}'),
        (COUNT, COUNT[:-1] + ',"limit":100,"time_range":7200}'),
        (COUNT[:-1] + ',"limit":100}', COUNT[:-1] + ',"limit":100.0}'),
        ("{}", '{"calculations":[]}'),
        ('{"filters":[{"column":"a","op":"=","value":0}]}', '{"filters":[{"value":-0.0,"op":"=","column":"a"}]}'),
        ('{"filters":[{"column":"a","op":"=","value":0.5}]}', '{"filters":[{"column":"a","op":"=","value":5e-1}]}'),
    ],
)
def test_same_meaning(expected: str, answer: str) -> None:
    assert queries.score(expected, answer)
    assert queries.score(answer, expected)


def filtered(value: Any, op: str = "=") -> str:
    return json.dumps({"filters": [{"column": "a", "op": op, "value": value}]})


@pytest.mark.parametrize(
    ("expected", "answer"),
    [
        (json.dumps(FULL), COUNT),
        (json.dumps(FULL), changed(limit=6)),
        (json.dumps(FULL), changed(time_range=60)),
        (json.dumps(FULL), changed(breakdowns=["host"])),
        (json.dumps(FULL), changed(breakdowns=["host", "region", "region"])),
        (json.dumps(FULL), changed(breakdowns=["host", "Region"])),
        (json.dumps(FULL), changed(filters=[])),
        (json.dumps(FULL), changed(filters=FULL["filters"] + FULL["filters"][:1])),
        (json.dumps(FULL), changed(calculations=[{"op": "COUNT"}, {"op": "P99", "column": "duration_ms"}])),
        (json.dumps(FULL), changed(orders=list(reversed(FULL["orders"])))),
        (json.dumps(FULL), json.dumps(FULL).replace("descending", "ascending")),
        (json.dumps(FULL), json.dumps(FULL).replace(">", "!=")),
        (json.dumps(FULL), json.dumps(FULL).replace("500", '"500"')),
        (COUNT, "{}"),
        (COUNT[:-1] + ',"limit":100}', COUNT[:-1] + ',"limit":10}'),
        (filtered(1), filtered(True)),
        (filtered(0), filtered(False)),
        (filtered("true"), filtered(True)),
        (filtered("a"), filtered("a ")),
        (filtered("é"), filtered("e\u0301")),
        (filtered(9007199254740993), filtered(9007199254740992)),
    ],
)
def test_different_meaning(expected: str, answer: str) -> None:
    assert queries.normalize(expected) is not None
    assert queries.normalize(answer) is not None
    assert not queries.score(expected, answer)
    assert not queries.score(answer, expected)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "null",
        "5",
        '"text"',
        "[]",
        f"[{COUNT}]",
        COUNT[:-1],
        COUNT + "}",
        COUNT + COUNT,
        f"```json\n{COUNT}\n```",
        f"Here it is: {COUNT}",
        COUNT + ".",
        "\ufeff" + COUNT,
        "\u00a0" + COUNT,
        COUNT.replace('"', "'"),
        COUNT[:-1] + ",}",
        '{"limit":NaN}',
        '{"limit":Infinity}',
        filtered(0).replace("0", "NaN"),
        filtered(0).replace("0", "-Infinity"),
        filtered(0).replace("0", "1e999"),
        filtered(0).replace("0", "1" * 5000),
        filtered(0).replace("0", "05"),
        '{"limit":5,"limit":6}',
        '{"limit":1,"limit":true}',
        '{"calculations":[{"op":"COUNT","op":"HEATMAP"}]}',
        '{"filters":[],"filters":[{"column":"a","op":"exists"}]}',
        '{"limits":5}',
        '{"Limit":5}',
        '{"limit":0}',
        '{"limit":-5}',
        '{"limit":2.5}',
        '{"limit":"5"}',
        '{"limit":true}',
        '{"limit":null}',
        '{"time_range":"1h"}',
        '{"breakdowns":"host"}',
        '{"breakdowns":null}',
        '{"breakdowns":[""]}',
        '{"breakdowns":[["host"]]}',
        '{"breakdowns":[{"column":"host"}]}',
        '{"calculations":{"op":"COUNT"}}',
        '{"calculations":["COUNT"]}',
        '{"calculations":[{}]}',
        '{"calculations":[{"op":"count"}]}',
        '{"calculations":[{"op":"COUNT","column":"host"}]}',
        '{"calculations":[{"op":"COUNT","column":null}]}',
        '{"calculations":[{"op":"P95"}]}',
        '{"calculations":[{"op":"P75","column":"a"}]}',
        '{"calculations":[{"op":"P95","column":5}]}',
        '{"calculations":[{"op":"P95","column":"a","name":"b"}]}',
        '{"calculations":[{"op":["P95"],"column":"a"}]}',
        '{"filters":[{"column":"a","op":"="}]}',
        '{"filters":[{"op":"=","value":5}]}',
        '{"filters":[{"column":"a","op":"==","value":5}]}',
        '{"filters":[{"column":"a","op":"exists","value":true}]}',
        filtered(None),
        filtered([1]),
        filtered({}),
        '{"orders":[{"column":"a"}]}',
        '{"orders":[{"order":"ascending"}]}',
        '{"orders":[{"op":"P95","order":"ascending"}]}',
        '{"orders":[{"op":"COUNT","column":"a","order":"ascending"}]}',
        '{"orders":[{"column":"a","order":"asc"}]}',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"filters":[{"column":"a","op":"=","value":' + "[" * 500 + "]" * 500 + "}]}",
    ],
)
def test_no_query(text: str) -> None:
    assert queries.normalize(text) is None
    assert not queries.score(text, text)
    assert not queries.score(COUNT, text)
    assert not queries.score(text, COUNT)


def test_normalize_is_pure_and_settled() -> None:
    text = changed(limit=100, time_range=60.0, breakdowns=["region", "host"], orders=[])
    once = queries.normalize(text)
    assert once is not None
    assert once["breakdowns"] == ["host", "region"]
    assert set(once) == {"calculations", "breakdowns", "filters", "time_range"}
    assert type(once["time_range"]) is int
    assert queries.normalize(json.dumps(once)) == once
    assert queries.normalize(text) == once


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@pytest.mark.slow
def test_the_scorer_accepts_what_the_schema_accepts() -> None:
    VALIDATOR.check_schema(queries.QUERY_SCHEMA)
    rng = random.Random(0)
    odd: list[Any] = [None, True, 0, 1, 5.0, 2.5, "", "x", "COUNT", "P95", "=", "exists", "ascending"]
    odd += [[], ["x"], {}, {"op": "COUNT"}]
    verdicts: collections.Counter[bool] = collections.Counter()
    for number in range(1500):
        query = copy.deepcopy(FULL if number % 2 else ANSWERS["train"][number])
        container, key = rng.choice(places(query))
        match rng.randrange(3):
            case 0:
                del container[key]
            case 1:
                container[key] = rng.choice(odd)
            case _ if isinstance(container, dict):
                container[rng.choice(["column", "op", "value", "order", "limit", "other"])] = rng.choice(odd)
            case _:
                container.append(rng.choice(odd))
        accepted = queries.normalize(json.dumps(query)) is not None
        assert accepted == VALIDATOR.is_valid(query), query
        verdicts[accepted] += 1
    assert min(verdicts[True], verdicts[False]) > 100


def test_every_object_of_the_schema_refuses_unknown_keys() -> None:
    objects = [queries.QUERY_SCHEMA] + [container[key] for container, key in places(queries.QUERY_SCHEMA)]
    closed = [each for each in objects if isinstance(each, dict) and each.get("type") == "object"]
    assert len(closed) == 8
    assert all(each["additionalProperties"] is False for each in closed)


# -- files ------------------------------------------------------------------------------------------------------------


def test_write(tmp_path: Path) -> None:
    train, test = questions.write(tmp_path / "a" / "b", 30, 10, seed=4)
    assert [train.name, test.name] == ["train.jsonl", "test.jsonl"]
    assert sorted(train.parent.iterdir()) == [test, train]
    for path, split, count in ((train, "train", 30), (test, "test", 10)):
        lines = path.read_bytes().decode().splitlines()
        rows = questions.generate(count, split, 4)
        assert len(lines) == count
        for line, row in zip(map(json.loads, lines), rows, strict=True):
            assert line == {
                "prompt": {"question": row["question"], "columns": row["columns"]},
                "completion": row["answer"],
            }


def test_write_replaces_and_repeats_itself(tmp_path: Path) -> None:
    first = [path.read_bytes() for path in questions.write(tmp_path, 5, 5, seed=0)]
    questions.write(tmp_path, 7, 0, seed=1)
    assert [path.read_bytes() for path in questions.write(tmp_path, 5, 5, seed=0)] == first
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_write_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        questions.write(tmp_path, 1, 1, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    questions.main(["--out", str(tmp_path), "--train", "3", "--test", "2", "--seed", "5"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")]
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["prompt"]["question"] for line in lines] == [
        row["question"] for row in questions.generate(3, "train", 5)
    ]


@pytest.mark.parametrize("extra", [["--train", "-1"], ["--test", "many"]])
def test_command_with_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        questions.main(["--out", str(tmp_path), *extra])
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_schema_file_is_the_schema() -> None:
    assert json.loads((ROOT / "examples" / "query.schema.json").read_text()) == queries.QUERY_SCHEMA
