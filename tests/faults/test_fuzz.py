"""Whatever bytes arrive, a parser of them returns or raises the error that it documents.

Each input is a valid one that was damaged, or JSON or bytes of any kind; `COGPRESS_FUZZ` is the number of each.
"""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import struct
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pyarrow
import pyarrow.parquet
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from starlette.applications import Starlette

from cogpress import config
from cogpress.cog import process, reading
from cogpress.data.prepare import read_examples
from cogpress.engines import patterns, schemas
from cogpress.errors import CogpressError
from cogpress.http import EventDecoder
from cogpress.playground import access
from cogpress.playground.api import routes as api
from cogpress.playground.api import webhooks
from cogpress.playground.backend import Backend
from cogpress.playground.catalog import Catalog
from cogpress.playground.openai import parameters
from cogpress.playground.openai import routes as openai
from cogpress.playground.openai.errors import OpenAIError
from cogpress.playground.predictions import Predictions
from cogpress.playground.queue import Queue
from cogpress.playground.records import Prediction, Version
from cogpress.playground.store import Store
from cogpress.playground.web import Parts
from cogpress.preflight import packages
from cogpress.serve import batch
from cogpress.serve import requests as inputs
from cogpress.weights import archive, manifest, tensors
from tests.playground.test_store import with_store

EXAMPLES = int(os.environ.get("COGPRESS_FUZZ", "25"))

fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize="COGPRESS_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # making a failure smaller takes minutes
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

# --- what is tried ----------------------------------------------------------------------------------------------------

ODD_TEXTS = st.sampled_from(["", "\0", "\ud800", "../x", "/etc/passwd", "a" * 300, "null", "-", "[" * 5000, "1" * 5000])
TEXTS = st.text(max_size=8) | ODD_TEXTS
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([-1, 2**31, 2**63, 2**64, 10**400, 0.5, 1e308, float("nan"), float("inf")])
    | TEXTS
)


DEEP = {f"nested {depth}": '{"a":' * depth + "[" * depth + "]" * depth + "}" * depth for depth in (45, 200, 600, 9000)}
"""What these texts stand for in a file: the library's own writer ends where Python's stack does."""


def values(keys: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """JSON of any shape, with these keys."""
    shaped = st.recursive(
        LEAVES, lambda one: st.lists(one, max_size=3) | st.dictionaries(keys | TEXTS, one, max_size=4), max_leaves=8
    )
    return shaped | st.sampled_from(sorted(DEEP))


def keys_of(value: Any) -> set[str]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return {*(value if isinstance(value, dict) else ()), *(key for one in inner for key in keys_of(one))}


@st.composite
def changed(draw: st.DrawFn, *valid: Any) -> Any:
    """Valid JSON with other JSON, or nothing, in one or two of its places."""
    value = json.loads(json.dumps(draw(st.sampled_from(valid))))
    keys = st.sampled_from(sorted({key for one in valid for key in keys_of(one)}) or ["a"])
    for _ in range(draw(st.integers(1, 2))):
        holder: Any = [value]
        at: Any = 0
        while isinstance(inner := holder[at], dict | list) and inner and draw(st.integers(0, 3)):
            holder, at = inner, draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if holder is not value and holder == [value] and at == 0:
            value = draw(values(keys))
        elif draw(st.integers(0, 4)) == 0:
            del holder[at]
        elif isinstance(holder, dict) and draw(st.booleans()):
            holder[draw(keys)] = draw(values(keys))
        else:
            holder[at] = draw(values(keys))
    return value


def text_of(value: Any) -> str:
    text = json.dumps(value)
    for name, nested in DEEP.items():
        text = text.replace(json.dumps(name), nested)
    return text


@st.composite
def damaged(draw: st.DrawFn, *valid: bytes) -> bytes:
    """Valid bytes, cut, overwritten, or with a part of them elsewhere."""
    content = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.sampled_from([0, 1, 1, 4, 64, 1024])))
        content[at:to] = draw(
            st.binary(max_size=6)
            | st.sampled_from([b"", b"\0" * 8, b"\xff" * 8, b"[" * 1200, b"\n", b'"', b"&a [*a]", b"9" * 5000])
            | st.just(bytes(content[: to - at]))
        )
    return bytes(content)


def json_bytes(*valid: Any) -> st.SearchStrategy[bytes]:
    """A JSON file: of another shape, or damaged."""
    shaped = changed(*valid).map(lambda value: text_of(value).encode())
    return shaped | damaged(*(json.dumps(one).encode() for one in valid)) | st.binary(max_size=40)


@contextmanager
def folder_with(name: str, content: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def refused_or(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """What a call returns; None where it refuses, in a sentence that a terminal can show."""
    try:
        return call(*given, **named)
    except CogpressError as error:
        said = str(error)
    assert 0 < len(said.encode()) < 3000
    return None


# --- weights ----------------------------------------------------------------------------------------------------------

FACTS = {"sha256": "0" * 64, "bytes": 3}
MANIFEST = {
    "format": 1,
    "kind": "weights",
    "cogpress": "1.0",
    "base": {"source": "a/b"},
    "files": {"model.safetensors": FACTS, "draft/config.json": FACTS},
}


@fuzzed
@given(json_bytes(MANIFEST))
@example(b"[" * 9000)
@example(b'{"cogpress": "1", "format": 1, "files": {"a": 1}}')
@example(b'{"cogpress": "1", "format": 1, "files": {"%s": {"sha256": "", "bytes": 1}}}' % (b"a" * 300))
def test_manifests(content: bytes) -> None:
    with folder_with(manifest.NAME, content) as folder:
        (folder / "model.safetensors").write_bytes(b"abc")
        facts = refused_or(manifest.read, folder)
        refused_or(manifest.listed, folder, "the manifest")
        if facts is not None:
            refused_or(manifest.check, folder, facts)
            refused_or(manifest.recorded_fingerprint, facts)
        with suppress(OSError):
            refused_or(manifest.signed_files, folder)


@fuzzed
@given(json_bytes({"passed": True, "checks": [{"name": "x"}], "files": {"model.safetensors": "0" * 64}}), st.data())
def test_verifications(content: bytes, data: st.DataObject) -> None:
    with folder_with("verification.json", content) as folder:
        (folder / manifest.NAME).write_bytes(data.draw(json_bytes(MANIFEST)))
        refused_or(manifest.read_verification, folder)
        assert manifest.state(folder) in manifest.STATE_MESSAGES


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]},
}


def safetensors(header: bytes, data: bytes = bytes(10)) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


VALID_TENSORS = safetensors(json.dumps(HEADER).encode())


@fuzzed
@given(json_bytes(HEADER).map(safetensors) | damaged(VALID_TENSORS) | st.binary(max_size=40))
@example(safetensors(b"[" * 9000))
@example(safetensors(b'{"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 10]}}'))
@example(safetensors(b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 10]}}'))
def test_safetensors_are_taken_only_if_the_library_takes_them(content: bytes) -> None:
    with folder_with("model.safetensors", content) as folder:
        found = refused_or(tensors.stored, folder)
        if found is not None:
            with safe_open(folder / "model.safetensors", framework="pt") as file:
                assert sorted(found) == sorted(file.keys())
                assert {name: tuple(file.get_tensor(name).shape) for name in found} == {
                    name: one.shape for name, one in found.items()
                }


@fuzzed
@given(json_bytes({"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "x.safetensors"}}))
@example(b"[" * 9000)
def test_indexes_of_shards(content: bytes) -> None:
    with folder_with("model.safetensors.index.json", content) as folder:
        (folder / "model-1.safetensors").write_bytes(VALID_TENSORS)
        refused_or(tensors.stored, folder)


def tar_bytes(form: int, mode: str = "w") -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode=mode, format=form) as tar:  # type: ignore[call-overload]
        for name in ("config.json", "sub/" + "long" * 30 + ".json"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes(700)))
    return made.getvalue()


TARS = (
    *(tar_bytes(form) for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)),
    tar_bytes(tarfile.PAX_FORMAT, "w:gz"),
)


def with_checksums(content: bytes) -> bytes:
    """The tar with right checksums in its headers, which would hide what is behind them."""
    made = bytearray(content)
    for at in range(0, len(made) - 511, 512):
        if made[at + 257 : at + 262] == b"ustar":
            made[at + 148 : at + 156] = b" " * 8
            made[at + 148 : at + 156] = b"%06o\0 " % sum(made[at : at + 512])
    return bytes(made)


@fuzzed
@given(damaged(*TARS) | damaged(*TARS[:2]).map(with_checksums) | st.binary(max_size=600))
def test_tars(content: bytes) -> None:
    with folder_with("weights.tar", content) as folder:
        refused_or(archive.unpack, folder / "weights.tar", folder / "to")
        assert {path.name for path in folder.iterdir()} <= {"weights.tar", "to"}


# --- examples ---------------------------------------------------------------------------------------------------------

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "u"}]},
    {"role": "assistant", "content": "a", "tool_calls": [CALL], "weight": 1, "reasoning_content": "r"},
    {"role": "tool", "content": "t", "tool_call_id": "1"},
    {"role": "assistant", "content": "b"},
]
ROWS = (
    {"messages": TURNS, "tools": [TOOL], "weight": 0.5},
    {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    {"prompt": {"question": "u"}, "completion": "a", "system": "s"},
    {"instruction": "i", "input": "n", "output": "o", "history": [["u", "a"]]},
    {"text": "t", "weight": 1},
)


def lines(row: bytes, name: str) -> bytes:
    """The row as a file of that kind, after another row."""
    first = json.dumps(ROWS[2]).encode()
    if name == "rows.json":
        return b"[" + first + b"," + row + b"]"
    if name == "pretty.json":
        return json.dumps(ROWS[2], indent=1).encode() + b"\n" + row
    return first + b"\n" + row + b"\n"


@fuzzed
@given(json_bytes(*ROWS), st.sampled_from(["rows.jsonl", "rows.json", "pretty.json", "rows", "rows.jsonl.gz"]))
@example(b'{"a": 1, "a": 2}, {', "rows.json")
@example(b'{"text": "t", "weight": 1%s}' % (b"0" * 400), "rows.jsonl")
@example(b'{"text": %s}' % DEEP["nested 200"].encode(), "pretty.json")
@example(b'{"messages": [{"role": "assistant", "tool_calls": "%s"}]}' % (b"[" * 9000), "rows.jsonl")
def test_rows(row: bytes, name: str) -> None:
    content = lines(row, name)
    with folder_with(name, gzip.compress(content) if name.endswith("gz") else content) as folder:
        found = refused_or(read_examples, folder / name)
        assert found is None or all(one.reason.isprintable() for one in found.problems)


def parquet(*columns: pyarrow.Array) -> bytes:
    made = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(dict(zip(("prompt", "completion"), columns, strict=True))), made)
    return made.getvalue()


PARQUETS = (
    parquet(pyarrow.array(["a", "b"]), pyarrow.array(["c", "d"])),
    parquet(pyarrow.array([{"q": "a"}, None]), pyarrow.array([2**62, -(2**63)], pyarrow.timestamp("us"))),
    parquet(pyarrow.array([[1.5], []]), pyarrow.array([1, 2], pyarrow.timestamp("ns", "Mars/Olympus"))),
)


@fuzzed
@given(st.sampled_from(PARQUETS) | damaged(*PARQUETS))
def test_parquet(content: bytes) -> None:
    with folder_with("rows.parquet", content) as folder:
        refused_or(read_examples, folder / "rows.parquet")


# --- schemas and patterns ---------------------------------------------------------------------------------------------

SCHEMAS = (
    {
        "type": "object",
        "properties": {
            "a": {"type": ["string", "null"], "pattern": "^a+$"},
            "b": {"type": "array", "items": {"$ref": "#/$defs/c"}, "minItems": 1, "prefixItems": [True]},
            "d": {"oneOf": [{"type": "integer", "minimum": 1}, {"const": "x"}]},
        },
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"c": {"enum": ["x", 1, None]}},
    },
    {"anyOf": [{"type": "string", "format": "date"}, {"allOf": [{"type": "string", "minLength": 1, "maxLength": 3}]}]},
)


@fuzzed
@given(changed(*SCHEMAS))
@example({"type": [[]]})
@example({"type": ["string", {}], "const": "x"})
def test_json_schemas(schema: Any) -> None:
    try:
        text = inputs.read({"json_schema": text_of(schema)}, None)[1].structure  # type: ignore[arg-type]
    except CogpressError:
        return
    assert text is not None
    parsed = json.loads(str(text.value))
    reason = schemas.unenforced(parsed)
    assert len(reason) < 1000
    if not reason:
        schemas._exact(parsed, "mark", {})


@fuzzed
@given(
    st.text("ab.*+?^$|()[]{}\\,:=!-<>dwsSDWAZbBNuxP019", max_size=12)
    | st.text(max_size=6)
    | st.builds(lambda depth, one: "(" * depth + one + ")" * depth, st.sampled_from([5, 80, 300, 2000]), TEXTS)
)
@example("(" * 300 + "x" + ")" * 300)
def test_patterns(pattern: str) -> None:
    patterns.unenforced(pattern)
    with suppress(ValueError):
        assert patterns.ebnf(pattern)


# --- files of a project -----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
MODEL_YAML, COG_YAML = ((ROOT / name).read_bytes()[:800] for name in ("model.yaml", "cog.yaml"))
PROGRAMS = tuple((ROOT / name).read_bytes() for name in ("predict.py", "train.py"))
YAML_TRICKS = (
    b"&a [*a]",
    b"train: {epochs: &a [*a]}",
    b"a: " + b"[" * 1200,
    b"a: 2021-13-45",
    b"? [a]\n: 1",
    b"a: &a [x, x, x, x, x, x, x, x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (i + 1, i + 1, b", ".join([b"*%c" % i] * 9)) for i in range(97, 105)),
    b"a: !!python/object/apply:os.system [x]",
    b"a: !!binary x",
    b"a: !!int x",
    b"<<: 1",
    b"a: " + b"9" * 5000,
)


@fuzzed
@given(
    damaged(MODEL_YAML)
    | st.sampled_from(YAML_TRICKS)
    | json_bytes({"name": "m", "train": {"epochs": 1}, "prompt": {"template": "{q}", "fields": {"q": {}}}})
)
@example(YAML_TRICKS[5])
@example(b"train: *h".join([YAML_TRICKS[5], b""]))
def test_model_yaml(content: bytes) -> None:
    with folder_with("model.yaml", content) as folder:
        refused_or(config.load, folder / "model.yaml")


@fuzzed
@given(damaged(COG_YAML) | st.sampled_from(YAML_TRICKS) | st.binary(max_size=40))
def test_cog_yaml(content: bytes) -> None:
    with folder_with("cog.yaml", content) as folder:
        refused_or(process.read_cog_yaml, folder)


@fuzzed
@given(damaged(*PROGRAMS) | st.binary(max_size=40), st.sampled_from(["run.py:Runner", "run.py:train"]))
@example(b"\0", "run.py:Runner")
@example(b"x = " + b"(" * 5000, "run.py:train")
def test_programs(content: bytes, reference: str) -> None:
    methods = reading.METHODS if reference.endswith("Runner") else reading.TRAINING
    with folder_with("run.py", content) as folder:
        try:
            target = reading.find(folder, reference, methods)
        except (OSError, UnicodeDecodeError, SyntaxError):
            return
        for loss in reading.losses(target):
            assert loss.line > 0
        reading.concurrency(target.method)
        reading.defaulted(target)
        reading.descriptions(target)


@fuzzed
@given(
    damaged(b"# all\na==1.0 --hash=sha256:00\n-r other.txt\nb[x] @ https://a/b.whl ; python_version < '3'\n./c.whl\n")
)
@example(b"./" + b"a" * 300 + b"\n-r " + b"a" * 300)
def test_requirements(content: bytes) -> None:
    text = content.decode(errors="replace")
    with folder_with("requirements.txt", text.encode()) as folder:
        packages.pins(text)
        for line in packages._lines(text):
            packages._refused(line, folder)
        list(packages._required(folder / "requirements.txt"))


# --- what servers and clients send ------------------------------------------------------------------------------------

STREAM = b': hi\r\nid: 1\nevent: output\ndata: {"a": "\xc3\xa9"}\ndata:\n\nretry: 5\nevent: done\ndata: {}\n\n'


@fuzzed
@given(damaged(STREAM), st.lists(st.integers(0, 120), max_size=8))
def test_event_streams_are_the_same_however_they_are_cut(content: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(one for one in cuts if one < len(content)), len(content)]
    decoder = EventDecoder()
    pieces = [content[low:high] for low, high in pairwise(places)]
    found = [event for piece in pieces for event in decoder.feed(piece)]
    assert list(map(vars, found)) == list(map(vars, EventDecoder().feed(content)))


INPUTS = {
    "prompt": "p",
    "messages": json.dumps(TURNS),
    "fields": '{"q": "a"}',
    "tools": json.dumps([TOOL]),
    "max_tokens": 8,
    "temperature": 0.5,
    "stop": '["a"]',
    "logit_bias": '{"0": 5}',
    "choices": '["a", "b"]',
    "json_schema": '{"type": "object"}',
    "thinking": True,
    "q": ["a"],
}
JSON_INPUTS = {
    "messages": TURNS,
    "fields": {"q": "a"},
    "tools": [TOOL],
    "stop": ["a"],
    "logit_bias": {"0": 5, " the": 1},
    "choices": ["a", "b"],
}


@fuzzed
@given(st.data(), st.sampled_from(sorted(JSON_INPUTS)))
def test_inputs_of_predictions(tokenizer: Any, data: st.DataObject, name: str) -> None:
    text = text_of(data.draw(changed(JSON_INPUTS[name])))
    either = data.draw(changed(INPUTS) | st.just({"prompt": "p", name: text}))
    if not isinstance(either, dict):
        return
    read = refused_or(inputs.read, either, tokenizer)
    if read is not None:
        refused_or(inputs.question, read[0], config.Prompt())


@fuzzed
@given(json_bytes(INPUTS, {"prompt": {"q": "a"}, "id": 1, **JSON_INPUTS}))
@example(DEEP["nested 600"].encode())
@example(b'{"%s": 1}' % (b"a" * 5000))
def test_lines_of_batches(line: bytes) -> None:
    fields = SCHEMA["components"]["schemas"]["Input"]["properties"]
    row = refused_or(batch.read, line)
    if row is not None:
        refused_or(batch.inputs, row, fields)


SCHEMA: dict[str, Any] = {
    "components": {
        "schemas": {
            "Input": {
                "properties": {
                    **{name: {"type": "string"} for name in ("prompt", "messages", "tools", "json_schema", "stop")},
                    **{name: {"type": "integer"} for name in ("max_tokens", "logprobs", "seed")},
                    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
                }
            }
        }
    }
}
BODY = {
    "model": "m",
    "messages": TURNS,
    "max_tokens": 8,
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["a"],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}},
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
}


@fuzzed
@given(changed(BODY, {"model": "m", "prompt": ["p"], "logprobs": 1, "echo": False}), st.booleans())
def test_bodies_of_openais_api(body: Any, chat: bool) -> None:
    if isinstance(body, dict):
        said: dict[str, Any] = {}
        try:
            parameters.parse(body, SCHEMA, chat=chat)
        except OpenAIError as error:
            said = error.body
        assert len(json.dumps(said)) < 3000


HEADERS = st.sampled_from(
    ["host", "origin", "authorization", "content-length", "content-type", "prefer", "cancel-after", "sec-fetch-site"]
)


class Instant:
    """A backend whose model ends at once."""

    slots = 4

    async def run(self, prediction: Prediction) -> None:
        prediction.start()
        prediction.end("succeeded", output=["a"])


async def posted(store: Store, path: str, body: bytes, headers: dict[str, bytes]) -> httpx.Response:
    version = Version("v", "local/m", 0.0, SCHEMA, "")
    queue = Queue(cast("Backend", Instant()), lambda _prediction: None)
    catalog = cast(
        "Catalog",
        SimpleNamespace(queue=lambda _: queue, resolve=lambda _: version, streams=lambda *_: False, on_end=None),
    )
    predictions = Predictions(store, catalog)
    parts = cast("Parts", SimpleNamespace(predictions=predictions, catalog=catalog, private_webhooks=False))
    app = access.Access(Starlette(routes=[*api.routes(parts), *openai.hosted(parts)]), access.RequestLimits())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        response = await client.post(path, content=body, headers={"prefer": b"wait=5", **headers})
    await queue.idle()
    await predictions.close()
    return response


@fuzzed
@given(
    json_bytes(
        {"version": "m", "input": {"prompt": "p"}, "webhook": "http://127.0.0.1/x", "webhook_events_filter": ["start"]},
        {"version": "m", "input": {"prompt": "p"}, "webhook_completed": None},
        {**BODY, "stream": False},
        {"model": "m", "prompt": ["p"]},
    ),
    st.sampled_from(["/v1/predictions", "/v1/chat/completions", "/v1/completions"]),
    st.just({}) | st.dictionaries(HEADERS, damaged(b"http://localhost:80", b"wait=5, x=1", b"30s", b"9"), max_size=2),
)
@example(b'{"version": "m", "input": %s}' % DEEP["nested 200"].encode(), "/v1/predictions", {})
@example(b'{"version": "m", "webhook_events_filter": [[]], "webhook": {}}', "/v1/predictions", {})
@example(b"{}", "/v1/predictions", {"content-length": b"1" * 5000})
def test_requests_to_both_apis(body: bytes, path: str, headers: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:

        async def work(store: Store) -> None:
            response = await posted(store, path, body, headers)
            assert response.status_code < 500
            assert isinstance(response.json(), dict)

        with_store(Path(folder), work)


@fuzzed
@given(
    damaged(b"https://user:pw@[::1]:80/a?b#c", b"http://x.invalid:99999/").map(lambda one: one.decode("latin-1"))
    | values(st.just("a")),
    st.none() | values(st.just("a")),
)
def test_webhooks(url: Any, events: Any) -> None:
    refused_or(lambda: asyncio.run(webhooks.check(url, events, private=True)))
