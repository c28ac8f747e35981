"""The worked example's task: a question and the columns at hand become an observability query in JSON.

Test rows show what was learned rather than remembered: all of their column names, the values of their filters and about
half of their combinations of clauses (`HELD_OUT`) are in no training row. The words around them are the same, because
unfamiliar words would test the base model.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from cogpress.files import new_file
from examples.columns import COLUMNS, FITTING, Column
from examples.queries import FILTER_OPS, OPS, PERCENTILES, PRESENCE


class Row(TypedDict):
    """One question, the columns it may use, and the one right query as compact JSON."""

    question: str
    columns: list[str]
    answer: str


# ---------------------------------------------------------------------------------------------------------------------
# Words. Each phrase has one meaning everywhere; none is ambiguous.
# ---------------------------------------------------------------------------------------------------------------------

_CALCULATION: dict[str, tuple[str, ...]] = {
    "COUNT": ("number of events", "event count"),
    "COUNT_DISTINCT": ("number of distinct {c}", "number of unique {c}"),
    "SUM": ("total {c}", "sum of {c}"),
    "AVG": ("average {c}", "mean {c}"),
    "MAX": ("maximum {c}", "max {c}"),
    "MIN": ("minimum {c}", "min {c}"),
    "HEATMAP": ("heatmap of {c}", "distribution of {c}"),
    **{op: (f"{op.lower()} of {{c}}", f"{rank} percentile of {{c}}") for op, rank in PERCENTILES.items()},
}
_CALCULATION["P50"] += ("median {c}", "median {c}")

_HOW_MANY = {
    "COUNT": ("How many events", "How many events"),
    "COUNT_DISTINCT": ("How many distinct {c}", "How many unique {c}"),
}

_ASKING = ("", "", "What is the ", "Show the ", "Give me the ")
_ASKING_RANKED = ("", "", "Show the ", "Give me the ")

_GROUPED = (" by {b}", " by {b}", " per {b}", " for each {b}", " grouped by {b}")

_RANKED = ("top {n} {b} by {calc}", "{n} {b} with the highest {calc}")

_CLAUSE: dict[str, tuple[str, ...]] = {  # after "where" or "when"
    "=": ("{c} is {v}", "{c} = {v}"),
    "!=": ("{c} is not {v}", "{c} != {v}"),
    ">": ("{c} is above {v}", "{c} > {v}"),
    "exists": ("{c} exists", "{c} is present"),
}

_PERIODS: dict[int, str] = {  # seconds
    600: "10 minutes",
    1800: "30 minutes",
    3600: "hour",
    86400: "day",
    604800: "week",
}
_PERIODS_ASKED = {"train": (600, 600, 1800, 1800, 3600, 86400, 604800), "test": tuple(_PERIODS)}
"""Training asks more often for the two that differ by a digit alone, as they are learnt last."""

_DURING = ("in the last {t}", "over the past {t}")

_LIMITS = {"train": (3, 5, 10, 20, 25, 50), "test": (3, 4, 5, 7, 8, 10, 12, 15, 30)}


# ---------------------------------------------------------------------------------------------------------------------
# Combinations of clauses
# ---------------------------------------------------------------------------------------------------------------------

_HELD_OUT = {  # calculation: filter ops withheld from questions without an order, and from those with one
    "COUNT": ("", "exists"),
    "SUM": ("exists", ""),
    "AVG": ("", "!="),
    "MAX": ("=", ""),
    "MIN": ("", ">"),
    "P50": ("!=", ""),
    "P95": ("", "="),
    "P99": ("exists", ""),
}

HELD_OUT: frozenset[tuple[str, str, bool]] = frozenset(
    (op, filter_op, ordered)
    for op, (without, with_order) in _HELD_OUT.items()
    for ordered, filter_ops in ((False, without), (True, with_order))
    for filter_op in filter_ops.split()
)
"""(calculation, filter op, has an order) that no training row and every fourth test row contains."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """The clauses of a question, before columns and words are chosen."""

    op: str
    breakdowns: int
    filter_op: str
    """Empty without a filter."""
    ranked: bool
    """Whether it asks for the top N, which gives the query an order and a limit."""
    timed: bool


def combinations(ops: Iterable[str], filter_ops: Iterable[str], ordered: bool) -> set[tuple[str, str, bool]]:
    """The combinations of one query, as in `HELD_OUT`: each calculation with each filter op."""
    filter_ops = tuple(filter_ops)
    return {(op, filter_op, ordered) for op in ops for filter_op in filter_ops}


def _weighted(rng: random.Random, weights: Sequence[float]) -> int:
    return rng.choices(range(len(weights)), weights)[0]


def _shape(rng: random.Random, split: str) -> _Shape:
    """A shape for a split: never a held-out combination in train, one in every fourth test row.

    Training rows have more clauses, so that fewer of them show everything often enough.
    """
    held_out = split == "test" and rng.random() < 0.25
    dense = split == "train"
    filtered = held_out or rng.random() < (0.7 if dense else 0.5)
    breakdowns = _weighted(rng, (0.4, 0.52, 0.08) if dense else (0.45, 0.51, 0.04))
    ranked = breakdowns > 0 and rng.random() < (0.5 if dense else 0.35)
    timed = rng.random() < (0.5 if dense or not ranked else 0.3)
    weights = {"COUNT": 2.0, "COUNT_DISTINCT": 1.5, "HEATMAP": 0.0 if ranked else 1.0}  # a heatmap has no rank
    while True:  # only the ops are redrawn: otherwise long questions would be rarer in train than in test
        op = OPS[_weighted(rng, [weights.get(op, 1.0) for op in OPS])]
        filter_op = rng.choice(FILTER_OPS) if filtered else ""
        if bool(combinations([op], [filter_op], ranked) & HELD_OUT) == held_out:
            return _Shape(op, breakdowns, filter_op, ranked, timed)


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Calculation:
    op: str
    column: str

    @property
    def json(self) -> dict[str, str]:
        return {"op": self.op, "column": self.column} if self.column else {"op": self.op}


@dataclass(frozen=True, slots=True)
class _Filter:
    column: str
    op: str
    value: str

    @property
    def json(self) -> dict[str, Any]:
        value = {} if self.op in PRESENCE else {"value": literal(self.value)}
        return {"column": self.column, "op": self.op, **value}


def literal(text: str) -> str | int | float | bool:
    """The JSON value of a word in a question: a number, true or false, or else text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool) else text


def generate(count: int, split: str, seed: int = 0) -> list[Row]:
    """Seeded rows of one split; the same arguments give the same rows in any process.

    A smaller count gives the beginning of a larger one. No two rows share both question and columns, within a split
    or across the two.

    Args:
        count: number of rows.
        split: `train` or `test`.
        seed: another seed gives other rows from the same columns and words.

    Raises:
        ValueError: the split is unknown or the count is negative.
    """
    if split not in COLUMNS:
        raise ValueError(f"split is {split!r}; it must be one of {', '.join(COLUMNS)}")
    if count < 0:
        raise ValueError(f"count is {count}; it must not be negative")
    # A string seed is hashed with SHA-512, the same in every process.
    rng = random.Random(f"{split}:{seed}")
    rows: list[Row] = []
    seen: set[tuple[str, ...]] = set()
    while len(rows) < count:
        row = _row(rng, split)
        key = (row["question"], *sorted(row["columns"]))
        if key not in seen:
            seen.add(key)
            rows.append(row)
    return rows


def _row(rng: random.Random, split: str) -> Row:
    shape = _shape(rng, split)
    free = list(COLUMNS[split])
    calculation = _Calculation(shape.op, "" if shape.op == "COUNT" else _take(rng, free, shape.op).name)
    breakdowns = [_take(rng, free, "breakdown").name for _ in range(shape.breakdowns)]
    condition = None
    if shape.filter_op:
        column = _take(rng, free, shape.filter_op)
        condition = _Filter(
            column.name, shape.filter_op, "" if shape.filter_op in PRESENCE else rng.choice(column.values)
        )
    limit = rng.choice(_LIMITS[split]) if shape.ranked else None
    period = rng.choice(_PERIODS_ASKED[split]) if shape.timed else None

    question, orders = _words(rng, calculation, breakdowns, condition, limit, period)
    query = {
        "calculations": [calculation.json],
        "breakdowns": breakdowns,
        "filters": [condition.json] if condition else [],
        "orders": orders,
        "limit": limit,
        "time_range": period,
    }
    answer = json.dumps({key: value for key, value in query.items() if value}, separators=(",", ":"))
    used = [name for name in [calculation.column, *breakdowns, condition.column if condition else ""] if name]
    return {"question": question, "columns": _listed(rng, used, split), "answer": answer}


def _take(rng: random.Random, free: list[Column], part: str) -> Column:
    """Remove and return a column that fits a part of a query: each column has one role in a question."""
    column = rng.choice([column for column in free if column.kind in FITTING[part]])
    free.remove(column)
    return column


def _listed(rng: random.Random, used: list[str], split: str) -> list[str]:
    """The used columns among 5 to 8, in random order; some of the others look like a used one."""
    others = [column.name for column in COLUMNS[split] if column.name not in used]
    words = {word for name in used for word in name.split(".")}
    similar = [name for name in others if words & set(name.split("."))]
    wanted = 5 + _weighted(rng, (0.45, 0.3, 0.15, 0.1)) - len(used)
    alike = rng.sample(similar, min(len(similar), (wanted + 1) // 2, wanted))
    rest = rng.sample([name for name in others if name not in alike], wanted - len(alike))
    columns = used + alike + rest
    rng.shuffle(columns)
    return columns


def _words(
    rng: random.Random,
    calculation: _Calculation,
    breakdowns: Sequence[str],
    condition: _Filter | None,
    limit: int | None,
    period: int | None,
) -> tuple[str, list[dict[str, str]]]:
    """The question, and the query's `orders`."""
    groups = " and ".join(breakdowns)
    named = rng.choice(_CALCULATION[calculation.op]).format(c=calculation.column)
    orders: list[dict[str, str]] = []
    if limit is not None:
        words = rng.choice(_RANKED)
        orders.append({**calculation.json, "order": "descending"})
        asked = rng.choice(_ASKING_RANKED) + words.format(n=limit, b=groups, calc=named)
    else:
        if calculation.op in _HOW_MANY and rng.random() < 0.5:
            asked = rng.choice(_HOW_MANY[calculation.op]).format(c=calculation.column)
        else:
            asked = rng.choice(_ASKING) + named
        asked += rng.choice(_GROUPED).format(b=groups) if groups else ""
    where = ""
    if condition:
        clause = rng.choice(_CLAUSE[condition.op]).format(c=condition.column, v=condition.value)
        where = f" {rng.choice(('where', 'where', 'when'))} {clause}"
    during = "" if period is None else " " + rng.choice(_DURING).format(t=_PERIODS[period])
    return f"{asked}{where}{during}{'?' if asked.startswith(('What', 'How')) else ''}", orders


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write(folder: Path, train: int, test: int, seed: int) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl`; each appears whole or not at all.

    Each line has a `prompt`, an object with the fields that the project's prompt template is filled with (`question`
    and `columns`), and the query as `completion`.

    Args:
        folder: made if missing.
        train: number of training rows.
        test: number of test rows.
        seed: as in `generate`.

    Returns:
        The paths of the two files, train first.

    Raises:
        ValueError: a count is negative.
    """
    # Both texts before either file: a wrong argument leaves no half of a data set.
    texts = {split: _lines(generate(count, split, seed)) for split, count in (("train", train), ("test", test))}
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in texts.items():
        with new_file(folder / f"{split}.jsonl") as part:
            part.write_text(text, encoding="utf-8", newline="\n")
    return folder / "train.jsonl", folder / "test.jsonl"


def _lines(rows: Iterable[Row]) -> str:
    return "".join(
        json.dumps({"prompt": {name: row[name] for name in ("question", "columns")}, "completion": row["answer"]})
        + "\n"
        for row in rows
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the two files from the command line: `python -m examples.questions --out FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.questions", description="Write train.jsonl and test.jsonl."
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the files go")
    parser.add_argument("--train", type=int, default=1000, metavar="N", help="training rows (default 1000)")
    parser.add_argument("--test", type=int, default=200, metavar="N", help="test rows (default 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="another seed, other rows (default 0)")
    chosen = parser.parse_args(arguments)
    try:
        for path in write(chosen.out, chosen.train, chosen.test, chosen.seed):
            print(path)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
