"""The worked example's task: a question and the columns at hand become an observability query in JSON.

Knows how such questions are worded, which query each one means, and when two queries mean the same; writes seeded
training and test files from that. Leaves chat templates, training and serving to the package, and models to the user.

Test rows are made to show what was learnt rather than remembered: all of their column names and about half of their
combinations of clauses (`HELD_OUT`) appear in no training row. Values of filters differ as well; the words around
them are the same, because a question in words never seen would test the base model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict


class Row(TypedDict):
    """One question, the columns it may use, and the one right query as compact JSON."""

    question: str
    columns: list[str]
    answer: str


# ---------------------------------------------------------------------------------------------------------------------
# The query: its parts, its schema and its meaning
# ---------------------------------------------------------------------------------------------------------------------

_PERCENTILES = {"P50": "50th", "P90": "90th", "P95": "95th", "P99": "99th"}
_NUMERIC = ("SUM", "AVG", "MAX", "MIN", *_PERCENTILES, "HEATMAP")
_OF_COLUMN = ("COUNT_DISTINCT", *_NUMERIC)
_PRESENCE = ("exists",)
_COMPARISONS = ("=", "!=", ">")

OPS = ("COUNT", *_OF_COLUMN)
"""What a query can calculate; COUNT alone takes no column."""

FILTER_OPS = (*_COMPARISONS, *_PRESENCE)
"""What a filter can demand of a column; the last two take no value."""

DEFAULTS: dict[str, Any] = {"limit": 100, "time_range": 7200}
"""What a query that leaves these out means: 100 groups, two hours (in seconds). No generated row asks for them, so an
answer that forgets a limit or a time range can never be right by default."""

_NAME = {"type": "string", "minLength": 1}
_SCALAR = {"type": ["string", "number", "boolean"]}
_COUNTING = {"type": "integer", "minimum": 1}


def _object(required: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": required, "required": list(required), "additionalProperties": False}


def _list(*items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": {"anyOf": list(items)}}


_DIRECTION = {"enum": ["descending", "ascending"]}

QUERY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "calculations": _list(
            _object({"op": {"enum": ["COUNT"]}}),
            _object({"op": {"enum": list(_OF_COLUMN)}, "column": _NAME}),
        ),
        "breakdowns": {"type": "array", "items": _NAME},
        "filters": _list(
            _object({"column": _NAME, "op": {"enum": list(_PRESENCE)}}),
            _object({"column": _NAME, "op": {"enum": list(_COMPARISONS)}, "value": _SCALAR}),
        ),
        "orders": _list(
            _object({"column": _NAME, "order": _DIRECTION}),
            _object({"op": {"enum": ["COUNT"]}, "order": _DIRECTION}),
            _object({"op": {"enum": list(_OF_COLUMN)}, "column": _NAME, "order": _DIRECTION}),
        ),
        "limit": _COUNTING,
        "time_range": _COUNTING,
    },
    "additionalProperties": False,
}
"""JSON schema of a query; `properties` are in the order in which answers are written. `time_range` is in seconds."""

_UNORDERED = ("calculations", "breakdowns", "filters")
"""Lists whose order means nothing. The order of `orders` does: the first one counts most."""


def normalize(text: str) -> dict[str, Any] | None:
    """What a query means, in a form that is equal for queries that mean the same.

    The order of keys, calculations, breakdowns and filters is settled, whole numbers are ints, and empty lists and
    default values are left out. Only JSON is accepted, with JSON's own whitespace around it.

    Returns:
        The query, or None if the text is not one: invalid JSON, NaN, a key given twice with different values, or
        anything that `QUERY_SCHEMA` refuses. Compare results as `score` does: for Python, 1 and True are equal.
    """
    try:
        query = json.loads(text, object_pairs_hook=_unique, parse_float=_number, parse_constant=_no_number)
    except (ValueError, RecursionError):  # RecursionError: brackets nested without end are a model's failure, not ours
        return None
    if not _fits(query, QUERY_SCHEMA):
        return None
    meant = {key: sorted(value, key=_bytes) if key in _UNORDERED else value for key, value in sorted(query.items())}
    return {key: value for key, value in meant.items() if value != [] and value != DEFAULTS.get(key)}


def score(expected: str, answer: str) -> bool:
    """Whether two texts are queries that mean the same; never raises, and False if either is not a query."""
    wanted, got = normalize(expected), normalize(answer)
    return wanted is not None and got is not None and _bytes(wanted) == _bytes(got)


def _bytes(value: Any) -> str:
    """A text that tells apart what `==` does not: 1 and True."""
    return json.dumps(value, sort_keys=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and _bytes(found[key]) != _bytes(value):
            raise ValueError(f"{key} is given twice")
        found[key] = value
    return found


def _number(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large")
    return int(number) if number.is_integer() else number


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
}


def _fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a parsed value fits a schema; knows the keywords `QUERY_SCHEMA` uses and no others.

    Written here because the scorer must run wherever Python does, and because one schema cannot contradict itself.
    """
    kinds = schema.get("type", [])
    names: list[str] = [kinds] if isinstance(kinds, str) else kinds
    if names and not any(_is(value, name) for name in names):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "anyOf" in schema and not any(_fits(value, option) for option in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        known = schema.get("additionalProperties", True) or value.keys() <= properties.keys()
        complete = all(key in value for key in schema.get("required", []))
        return known and complete and all(_fits(item, properties.get(key, {})) for key, item in value.items())
    if isinstance(value, list):
        return all(_fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, str):
        return len(value) >= int(schema.get("minLength", 0))
    return not isinstance(value, int | float) or bool(value >= schema.get("minimum", value))


def _is(value: Any, name: str) -> bool:
    # a bool is an int to Python but not to JSON
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))


# ---------------------------------------------------------------------------------------------------------------------
# Columns
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A column that questions can be about.

    `kind` says what may be asked of it: `number` is measured, `code` is a label made of digits, `text` a label, `flag`
    true or false, `prose` free text, `id` names one thing. `values` are filter values as a question writes them.
    """

    name: str
    kind: str
    values: tuple[str, ...]


_TRAIN_COLUMNS = (  # kind, values, names
    ("number", "50 100 200 250 500", "duration_ms db.duration_ms tls.handshake_ms"),
    ("number", "100 400 600 1000 2000", "queue.wait_ms render_ms gc.pause_ms http.latency job.runtime span.self_ms"),
    ("number", "1 2 5 10 20", "retry_count retries db.rows db.connections error_count http.redirects span.links"),
    ("number", "5 10 16 25 60", "queue.depth pool.active thread.count worker.count batch.size cache.misses"),
    ("number", "0.1 0.25 0.5 0.9", "cpu.load cpu.usage cache.ratio sample_rate disk.usage load_avg"),
    ("number", "64 128 256 512 1024", "memory_mb disk.free http.request.size http.body_size response.bytes"),
    ("number", "80 450 800 4096", "net.bytes_in net.bytes_out message.size file.size"),
    ("code", "200 201 301 404 429 500 503", "http.status_code status_code http.status response.code"),
    ("code", "0 1 13 14 137", "exit_code process.exit"),
    ("code", "80 443 5432 8080", "server.port net.port client.port"),
    ("text", "search users frontend auth orders", "service.name service app.name peer.service team.name"),
    ("text", "GET POST HEAD TRACE PATCH", "http.method http.request.method method"),
    ("text", "prod test dev canary", "env deployment.env service.env cloud.account"),
    ("text", "us-east us-west eu-west eu-north", "cloud.region region dc.name cloud.zone"),
    ("text", "web-1 web-2 api-1 api-7 db-3", "host.name host node.name server.name k8s.node k8s.pod container.name"),
    ("text", "default system jobs ingress", "k8s.namespace k8s.cluster service.namespace"),
    ("text", "postgres oracle redis sqlite", "db.system db.type db.driver"),
    ("text", "users items invoices events", "db.table db.name db.collection queue.name"),
    ("text", "SELECT COPY MERGE", "db.operation sql.verb"),
    ("text", "timeout closed reset lost", "error.type error.kind exception.type status.reason"),
    ("text", "v1 v2 v3 v4", "service.version app.version release api.version"),
    ("text", "info warn error debug", "log.level"),
    ("text", "free pro team business", "user.plan account.tier customer.plan"),
    ("text", "US DE FR IT", "user.country client.country geo.country"),
    ("text", "mac android web windows", "os.name client.os platform device.os"),
    ("text", "Brave Edge Opera", "browser.name browser client.name"),
    ("text", "List Get Create Delete", "span.name operation"),
    ("text", "server client external internal", "span.kind"),
    ("text", "hit miss stale", "cache.result cache.state"),
    ("text", "edge core mesh", "envoy.cluster istio.route consul.peer"),
    ("text", "shard-1 shard-2 shard-6", "mongo.shard redis.keyspace elastic.index"),
    ("number", "70 110 700 950", "envoy.retries mongo.docs redis.keys"),
    ("text", "gzip br zstd", "http.encoding net.encoding"),
    ("prose", "/api /v1 /admin /health /login", "http.route http.url url.path http.target request.path"),
    ("prose", "failed denied timeout invalid", "error.message exception.message log.message log.body message"),
    ("prose", "SELECT JOIN users", "db.statement sql.query"),
    ("prose", "Mozilla curl bot", "user_agent http.user_agent"),
    ("flag", "true false", "error cache.hit is_root user.beta tls.enabled job.success http.retried feature.enabled"),
    ("id", "", "user.id session.id request.id customer.id account.id tenant.id device.id job.id client.ip"),
    ("id", "", "trace.id span.id trace.parent_id"),
)

_TEST_COLUMNS = (
    ("number", "15 40 75 300 750 1500", "lambda.billed_ms video.stall_ms agent.idle ci.elapsed"),
    ("number", "3 4 6 8 12 30", "kafka.lag kafka.age cart.items game.score vm.cores order.weight"),
    ("number", "0.2 0.7 0.95 1.5", "agent.util wifi.signal tax.rate sensor.drift robot.battery"),
    ("number", "35 90 350 900", "cart.total payment.amount sensor.temp s3.size video.bitrate robot.fan"),
    ("code", "7 9 11 33", "kafka.partition wifi.channel robot.axis video.track"),
    ("text", "paypal maestro direct", "payment.provider payment.gateway"),
    ("text", "gold blue black", "payment.card"),
    ("text", "USD CAD AUD", "cart.currency tax.currency"),
    ("text", "signups plays", "kafka.topic kafka.group s3.bucket"),
    ("text", "A100 H100 L4", "vm.model vm.class vm.flavor"),
    ("text", "h264 vp9 av1", "video.codec"),
    ("text", "resize notify export", "lambda.name lambda.handler"),
    ("text", "main hotfix release", "ci.branch ci.pipeline"),
    ("text", "dhl ups fedex", "order.carrier"),
    ("text", "normal low high", "mail.priority mail.queue"),
    ("text", "castle forest river", "game.map game.mode"),
    ("text", "north south east", "store.zone store.dock"),
    ("prose", "broken product author", "mail.subject email.subject chat.text"),
    ("prose", "media backup logs", "s3.prefix lambda.arn"),
    ("prose", "viewer product author", "graphql.field graphql.document"),
    ("flag", "true false", "lambda.cold payment.declined email.bounced ci.passed order.delayed cart.expired"),
    ("id", "", "player.uid cart.uid payment.ref sensor.serial email.recipient order.label"),
)


def _columns(table: Iterable[tuple[str, str, str]]) -> tuple[Column, ...]:
    return tuple(Column(name, kind, tuple(values.split())) for kind, values, names in table for name in names.split())


COLUMNS = {"train": _columns(_TRAIN_COLUMNS), "test": _columns(_TEST_COLUMNS)}
"""Every column of a split; the splits share no name, and each test name has a word that no training name has."""

_FITTING: dict[str, tuple[str, ...]] = {
    "breakdown": ("text", "code", "flag", "id"),
    "COUNT_DISTINCT": ("text", "id", "prose"),
    **dict.fromkeys(_NUMERIC, ("number",)),
    "=": ("text", "code", "flag"),
    "!=": ("text", "code"),  # "is not true" could as well mean false
    ">": ("number", "code"),
    **dict.fromkeys(_PRESENCE, ("number", "code", "text", "prose", "id")),  # "is set" could as well mean true
}
"""The kinds of column that a part of a query makes sense for."""


# ---------------------------------------------------------------------------------------------------------------------
# Words. Each phrase means one thing wherever it stands; none that could be read in two ways is here.
# ---------------------------------------------------------------------------------------------------------------------

_CALCULATION: dict[str, tuple[str, ...]] = {
    "COUNT": ("number of events", "event count"),
    "COUNT_DISTINCT": ("number of distinct {c}", "number of unique {c}"),
    "SUM": ("total {c}", "sum of {c}"),
    "AVG": ("average {c}", "mean {c}"),
    "MAX": ("maximum {c}", "max {c}"),
    "MIN": ("minimum {c}", "min {c}"),
    "HEATMAP": ("heatmap of {c}", "distribution of {c}"),
    **{op: (f"{op.lower()} of {{c}}", f"{rank} percentile of {{c}}") for op, rank in _PERCENTILES.items()},
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
_DURING = ("in the last {t}", "over the past {t}")

_LIMITS = {"train": (3, 5, 10, 20, 25, 50), "test": (3, 4, 5, 7, 8, 10, 12, 15, 30)}


# ---------------------------------------------------------------------------------------------------------------------
# Which clauses stand together
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
"""(calculation, filter op, has an order) that no training row holds and every fourth test row does."""


@dataclass(frozen=True, slots=True)
class _Shape:
    """Which clauses a question has, before any column or word is chosen."""

    op: str
    breakdowns: int
    filter_op: str
    """Empty where nothing is filtered."""
    ranked: bool
    """Whether it asks for the top so many, which gives the query an order and a limit."""
    timed: bool


def combinations(ops: Iterable[str], filter_ops: Iterable[str], ordered: bool) -> set[tuple[str, str, bool]]:
    """What `HELD_OUT` holds, for one query: each of its calculations with each of its filter ops."""
    filter_ops = tuple(filter_ops)
    return {(op, filter_op, ordered) for op in ops for filter_op in filter_ops}


def _weighted(rng: random.Random, weights: Sequence[float]) -> int:
    return rng.choices(range(len(weights)), weights)[0]


def _shape(rng: random.Random, split: str) -> _Shape:
    """A shape for a split: never a held-out combination in train, one in every fourth test row."""
    held_out = split == "test" and rng.random() < 0.25
    filtered = held_out or rng.random() < 0.5
    breakdowns = _weighted(rng, (0.45, 0.51, 0.04))
    ranked = breakdowns > 0 and rng.random() < 0.35
    timed = rng.random() < (0.3 if ranked else 0.5)
    weights = {"COUNT": 2.0, "COUNT_DISTINCT": 1.5, "HEATMAP": 0.0 if ranked else 1.0}  # a heatmap has no rank
    while True:  # only the ops are drawn anew, or long questions would be rarer in train and commoner in test
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
        value = {} if self.op in _PRESENCE else {"value": literal(self.value)}
        return {"column": self.column, "op": self.op, **value}


def literal(text: str) -> str | int | float | bool:
    """The JSON value a question's word stands for: numbers and true or false are themselves, the rest is text."""
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
    # a string seed is hashed with SHA-512, which no process randomizes
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
            column.name, shape.filter_op, "" if shape.filter_op in _PRESENCE else rng.choice(column.values)
        )
    limit = rng.choice(_LIMITS[split]) if shape.ranked else None
    period = rng.choice(list(_PERIODS)) if shape.timed else None

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
    """Remove and return a column that fits a part of a query, so that each column has one role in a question."""
    column = rng.choice([column for column in free if column.kind in _FITTING[part]])
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
    # both texts before either file, so that a wrong argument leaves no half of a data set
    texts = {split: _lines(generate(count, split, seed)) for split, count in (("train", train), ("test", test))}
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_replace(folder / f"{split}.jsonl", text) for split, text in texts.items()]
    return paths[0], paths[1]


def _lines(rows: Iterable[Row]) -> str:
    return "".join(
        json.dumps({"prompt": {name: row[name] for name in ("question", "columns")}, "completion": row["answer"]})
        + "\n"
        for row in rows
    )


def _replace(path: Path, text: str) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    part = Path(name)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        part.chmod(0o644)  # temporary files are their owner's alone
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the two files from the command line: `python -m examples.queries --out FOLDER`."""
    parser = argparse.ArgumentParser(prog="python -m examples.queries", description="Write train.jsonl and test.jsonl.")
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
