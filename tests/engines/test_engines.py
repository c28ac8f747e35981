"""The same tests for every engine, with two adapters over the base that they share."""

from __future__ import annotations

import asyncio
import json
import math
import re
import threading
from collections.abc import Awaitable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import pytest

from cogpress import config, prompts
from cogpress.engines import base as engine
from cogpress.engines.base import Adapter, Delta, Sampling, Structure
from cogpress.errors import CogpressError
from cogpress.merge import merge
from cogpress.serve import adapters
from cogpress.weights import manifest
from examples import queries, questions
from tests.engines.test_schemas import ENFORCED

pytestmark = [pytest.mark.slow, pytest.mark.server]

_T = TypeVar("_T")


class Loop:
    """An event loop that runs for the lifetime of an engine, which belongs to one loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(300)


class Asked:
    """An engine and its tokenizer, for tests to ask."""

    def __init__(
        self, made: engine.Engine, tokenizer: Any, ready: dict[str, adapters.ReadyAdapter], loop: Loop
    ) -> None:
        self.engine, self.tokenizer, self.ready, self.loop = made, tokenizer, ready, loop

    def prompt(self, text: str, adapter: str | None = None, **fields: Any) -> list[int]:
        form = self.ready[adapter].prompt if adapter else config.Prompt()
        return prompts.encode(self.tokenizer, prompts.Question(text, fields or None), form)

    async def deltas(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> list[Delta]:
        await self.engine.check(sampling)
        with_ = self.ready[adapter].adapter if adapter else None
        return [delta async for delta in self.engine.generate(prompt, sampling, with_)]

    async def text(self, prompt: list[int], sampling: Sampling, adapter: str | None = None) -> str:
        return "".join(delta.text for delta in await self.deltas(prompt, sampling, adapter))

    def answer(self, text: str, adapter: str | None = None, **sampling: Any) -> str:
        return self.loop.run(self.text(self.prompt(text, adapter), Sampling(**sampling), adapter))

    def all(self, *work: Awaitable[_T]) -> list[_T]:
        async def gathered() -> list[_T]:
            return list(await asyncio.gather(*work))

        return self.loop.run(gathered())


@pytest.fixture(scope="module")
def ready(trained_weights: Path, operations_adapter: Path) -> dict[str, adapters.ReadyAdapter]:
    found = {}
    for number, (name, folder) in enumerate(
        {"queries": trained_weights.parent / "adapter", "operations": operations_adapter}.items(), 1
    ):
        read = adapters.read(name, folder)
        prompt = config.Prompt.model_validate(read.facts["prompt"])
        found[name] = adapters.ReadyAdapter(Adapter(name, number, folder, adapters.rank(read)), prompt)
    return found


@pytest.fixture(scope="module")
def shared_base(base_folder: Path, ready: dict[str, adapters.ReadyAdapter], cache: Path) -> Path:
    key = {adapters.read(name, one.adapter.folder).base_key for name, one in ready.items()}
    [only] = key
    target = cache / "shared" / only[:16]
    if not (target / manifest.NAME).is_file():
        merge.write_base(base_folder, ready["queries"].adapter.folder, target)
    return target


@pytest.fixture(scope="module", params=engine.names())
def asked(
    request: pytest.FixtureRequest, shared_base: Path, ready: dict[str, adapters.ReadyAdapter], tokenizer: Any
) -> Iterator[Asked]:
    loop = Loop()
    settings = config.Serve(engine=request.param, max_context=2048)
    rank = max(one.adapter.rank for one in ready.values())

    async def start() -> engine.Engine:
        return engine.load(shared_base, settings, 16, rank)

    made = loop.run(start())
    yield Asked(made, tokenizer, ready, loop)
    made.shutdown()
    loop.loop.call_soon_threadsafe(loop.loop.stop)


@pytest.fixture(scope="module")
def rows() -> list[questions.Row]:
    return questions.generate(16, "test", seed=0)


MANY: dict[str, Any] = {f"p{number}": {} for number in range(4000)}
"""Optional properties in any order: more than can be compiled in seconds."""


def ask(asked: Asked, row: questions.Row) -> list[int]:
    return asked.prompt("", "queries", question=row["question"], columns=row["columns"])


def operation(row: questions.Row) -> str:
    return str(json.loads(row["answer"])["calculations"][0]["op"])


def test_adapters_of_two_tasks_and_the_base_answer_side_by_side(
    asked: Asked, rows: list[questions.Row], answered: list[dict[str, Any]]
) -> None:
    greedy = Sampling(max_tokens=160)
    rows = rows[:4]
    found = asked.all(
        *(asked.text(ask(asked, row), greedy, "queries") for row in rows),
        *(asked.text(asked.prompt(row["question"], "operations"), greedy, "operations") for row in rows),
        asked.text(asked.prompt("What is the capital of France?"), replace(greedy, max_tokens=20)),
    )
    queried, named, base = found[:4], found[4:8], found[8]
    assert sum(one["answer"] == text for one, text in zip(answered, queried, strict=False)) >= 3
    assert sum(operation(row) == text for row, text in zip(rows, named, strict=True)) >= 3
    assert "Paris" in base, "adapters leave the base unchanged"


def test_the_reference_engine_swaps_adapters_if_it_keeps_only_one(
    shared_base: Path,
    ready: dict[str, adapters.ReadyAdapter],
    tokenizer: Any,
    rows: list[questions.Row],
    tmp_path: Path,
) -> None:
    loop = Loop()
    settings = config.Serve(engine="transformers", max_context=2048, adapters_kept=1)
    rank = max(one.adapter.rank for one in ready.values())
    made = engine.load(shared_base, settings, 16, rank)
    asked = Asked(made, tokenizer, ready, loop)
    prompt, greedy = ask(asked, rows[0]), Sampling(max_tokens=12)
    missing = Adapter("missing", 9, tmp_path, rank)

    def answer(adapter: str | None) -> str:
        return loop.run(asked.text(prompt, greedy, adapter))

    async def fails() -> None:
        async for _ in made.generate(prompt, greedy, missing):
            pass

    first = {name: answer(name) for name in (None, "queries", "operations")}
    assert len(set(first.values())) == 3
    with pytest.raises((OSError, ValueError)):
        loop.run(fails())
    # The adapter that failed to load has evicted another, and no other adapter answers for it.
    for name in ("operations", "queries", "queries", None, "operations"):
        assert answer(name) == first[name], name
    made.shutdown()
    loop.loop.call_soon_threadsafe(loop.loop.stop)


def test_text_comes_as_it_is_generated_and_ends_with_a_reason(asked: Asked, rows: list[questions.Row]) -> None:
    deltas = asked.loop.run(asked.deltas(ask(asked, rows[0]), Sampling(max_tokens=160), "queries"))
    assert len([delta for delta in deltas if delta.text]) > 10
    assert [delta.finish_reason for delta in deltas][-1] == "stop"
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    cut = asked.loop.run(asked.deltas(ask(asked, rows[0]), Sampling(max_tokens=5), "queries"))
    assert (sum(delta.tokens for delta in cut), cut[-1].finish_reason) == (5, "length")


@pytest.mark.parametrize("text", ["a schema", "an expression", "choices", "EBNF"])
def test_answers_have_the_form_that_was_asked_for(asked: Asked, text: str) -> None:
    """From the untuned base, at a temperature at which it would not follow the form by itself."""
    hot = {"temperature": 1.5, "max_tokens": 200, "seed": 5}
    if text == "a schema":
        schema = {
            "type": "object",
            "properties": {
                "op": {"enum": ["COUNT", "AVG"]},
                "limit": {"type": "integer", "maximum": 99, "minimum": 0},
                "name": {"type": ["string", "null"], "maxLength": 5},
                "code": {"type": "string", "pattern": "^a(?:b+c)?$"},
                "day": {"type": "string", "format": "date"},
            },
            "required": ["op", "limit", "name", "code", "day"],
            "additionalProperties": False,
        }
        got = json.loads(asked.answer("Say hello.", structure=Structure("json", json.dumps(schema)), **hot))
        jsonschema.validate(got, schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    elif text == "an expression":
        assert re.fullmatch(
            "[A-Z]{3}-[0-9]{2,4}", asked.answer("Hello", structure=Structure("regex", "[A-Z]{3}-[0-9]{2,4}"), **hot)
        )
    elif text == "choices":
        choices = ("yes", 'no, "never"', "über")
        assert asked.answer("Hello", structure=Structure("choice", choices), **hot) in choices
    else:
        grammar = 'root ::= "SELECT " name (", " name)? ";"\nname ::= [a-z]{1,8}\n'
        assert re.fullmatch(
            r"SELECT [a-z]{1,8}(, [a-z]{1,8})?;", asked.answer("Hello", structure=Structure("grammar", grammar), **hot)
        )


@pytest.mark.parametrize(
    ("structure", "said"),
    [
        (Structure("json", '{"type": "nothing"}'), "json_schema"),
        (Structure("regex", "(a"), "regex"),
        (Structure("grammar", "root ::= missing"), "grammar"),
        (Structure("json", json.dumps({"type": "object", "properties": MANY})), "json_schema takes"),
        (Structure("json", '{"properties":{"a":' * 100 + "{}" + "}}" * 100), "nested more than 64 levels deep"),
        (Structure("json", json.dumps({"enum": ["x" * 100_000]})), "the limit is 65,536"),
    ],
)
def test_an_impossible_structure_is_refused_before_anything_is_generated(
    asked: Asked, structure: Structure, said: str
) -> None:
    with pytest.raises(CogpressError, match=said):
        asked.loop.run(asked.engine.check(Sampling(structure=structure)))
    assert asked.engine.unfinished == 0
    assert asked.answer("Hello", max_tokens=3)


def test_what_can_be_enforced_is_taken_by_each_engine(asked: Asked) -> None:
    async def check(schema: Any) -> None:
        await asked.engine.check(Sampling(structure=Structure("json", json.dumps(schema))))

    for schema in ENFORCED.values():
        asked.loop.run(check(schema))
    with pytest.raises(CogpressError, match=r"json_schema cannot be used: minItems is greater than maxItems: 2 > 1\.$"):
        asked.loop.run(check({"type": "array", "minItems": 2, "maxItems": 1}))


def test_every_answer_of_the_example_parses_with_its_schema(asked: Asked, rows: list[questions.Row]) -> None:
    structure = Structure("json", json.dumps(queries.QUERY_SCHEMA))
    texts = asked.all(
        *(
            asked.text(
                ask(asked, row), Sampling(max_tokens=400, temperature=1.2, seed=at, structure=structure), "queries"
            )
            for at, row in enumerate(rows[:2])
        )
    )
    assert all(queries.normalize(text) is not None for text in texts), texts


def test_log_probabilities_are_those_of_the_tokens(asked: Asked, rows: list[questions.Row]) -> None:
    prompt = asked.prompt("What is the capital of France?")
    deltas = asked.loop.run(asked.deltas(prompt, Sampling(max_tokens=8, logprobs=3)))
    ids = [token for delta in deltas for token in delta.token_ids]
    values = [value for delta in deltas for value in delta.logprobs]
    others = [found for delta in deltas for found in delta.alternatives]
    assert len(ids) == len(values) == len(others) == 8
    for token, value, found in zip(ids, values, others, strict=True):
        assert found[token] == value == max(found.values()) <= 0
        assert 3 <= len(found) <= 4
        assert sum(map(math.exp, found.values())) <= 1.001
    scored = asked.loop.run(asked.engine.score(prompt + ids))
    assert scored[0] == 0
    assert scored[len(prompt) :] == pytest.approx(values, abs=0.05)


def test_a_bias_decides(asked: Asked, tokenizer: Any) -> None:
    [wanted] = tokenizer("llama", add_special_tokens=False)["input_ids"][:1]
    text = asked.answer("Hello", max_tokens=3, logit_bias={wanted: 100.0})
    assert text == tokenizer.decode([wanted] * 3)
    plain = asked.answer("What is the capital of France?", max_tokens=1)
    [first] = tokenizer(plain, add_special_tokens=False)["input_ids"]
    assert asked.answer("What is the capital of France?", max_tokens=1, logit_bias={first: -100.0}) != plain


def test_a_seed_gives_the_same_answer_again(asked: Asked) -> None:
    hot = {"temperature": 2.0, "max_tokens": 12, "top_k": 50, "top_p": 0.95, "min_p": 0.01}
    found = [asked.answer("Tell a story.", seed=seed, **hot) for seed in (1, 2, 1)]
    assert found[0] == found[2] != found[1]


def test_a_stop_text_that_falls_across_chunks_ends_the_answer(asked: Asked, rows: list[questions.Row]) -> None:
    greedy = Sampling(max_tokens=24)
    prompt = ask(asked, rows[0])
    deltas = asked.loop.run(asked.deltas(prompt, greedy, "queries"))
    whole = "".join(delta.text for delta in deltas)
    # From inside one chunk to inside another.
    at = len(deltas[2].text) + len(deltas[0].text) + len(deltas[1].text)
    stop = whole[at - 2 : at + 5]
    got = asked.loop.run(asked.deltas(prompt, replace(greedy, stop=[stop, "nowhere"]), "queries"))
    assert "".join(delta.text for delta in got) == whole[: whole.index(stop)]
    assert got[-1].finish_reason == "stop"


def test_penalties_change_what_is_repeated(asked: Asked, rows: list[questions.Row]) -> None:
    """The untuned base repeats itself when it is asked for a query."""
    prompt = f"{rows[0]['question']}\nColumns:\n" + "\n".join(rows[0]["columns"])
    penalties: tuple[dict[str, float], ...] = (
        {}, {"repetition_penalty": 1.5}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0},
    )  # fmt: skip
    encoded = asked.prompt(prompt)
    plain, *others = asked.all(*(asked.text(encoded, Sampling(max_tokens=60, **penalty)) for penalty in penalties))
    for penalty, text in zip(penalties[1:], others, strict=True):
        assert text != plain, penalty


def test_an_answer_may_not_end_early(asked: Asked) -> None:
    plain = asked.loop.run(asked.deltas(asked.prompt("Say yes."), Sampling(max_tokens=60)))
    least = sum(delta.tokens for delta in plain) + 3
    longer = asked.loop.run(asked.deltas(asked.prompt("Say yes."), Sampling(max_tokens=least, min_tokens=least)))
    assert sum(delta.tokens for delta in longer) == least


def test_a_closed_request_leaves_the_engine(asked: Asked) -> None:
    async def read_a_little() -> None:
        answer = asked.engine.generate(asked.prompt("Count up."), Sampling(max_tokens=1500, min_tokens=1500))
        async for _ in answer:
            break
        await answer.aclose()  # type: ignore[attr-defined]

    asked.all(*(read_a_little() for _ in range(4)))
    assert asked.engine.unfinished == 0
    asked.answer("Hello", max_tokens=2)


def test_nothing_is_lost_when_many_ask(asked: Asked) -> None:
    texts = asked.all(*(asked.text(asked.prompt(f"Say {n}."), Sampling(max_tokens=4, min_tokens=4)) for n in range(20)))
    assert len(texts) == 20
    assert all(texts)
    assert not asked.engine.dead
