"""A JSON schema is enforced or refused: what the grammar accepts is compared with a validator."""

from __future__ import annotations

import copy
import json
import random
import re
from datetime import datetime
from datetime import time as datetime_time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar

from cogpress.config import Serve
from cogpress.engines import grammar, vllm
from cogpress.engines.base import Structure
from cogpress.engines.grammar import Guard
from cogpress.engines.schemas import ebnf, unenforced
from cogpress.errors import CogpressError

END = 256

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 5, 10, -1, 1.5, 2.5, "", "a", "b", "ab", "abc", "abcd", "\u00e9", "2020-01-01"),
    *("a@b.co", "a.b", "1.2.3.4", "2020-02-30", "2019-02-29", "1900-02-29", "2000-02-29", "23:59:59Z", "24:00:00Z"),
    *("2020-01-01T00:00:00.5+01:30", "P1DT2H", "P1M2W", "::1", "1::2::3", "1.2.3.04", "http://a.b/c", '"', "\n", "\t"),
    *(
        "123e4567-e89b-12d3-a456-426614174000",
        "\U0001f600",
        "\x1f",
        [],
        [1],
        [1, 1],
        [1, 2],
        [1, "a"],
        ["a"],
        ["a", 1],
        [1, 2, 3],
        [1, 2, 3, 4],
        [None],
        {},
    ),
    *({"a": 1}, {"b": 1}, {"a": 1, "b": 2}, {"a": "x"}, {"a": "x", "b": "y"}, {"a": 1, "c": 3}, {"c": 3}, {"a": "y"}),
    *({"a": 1, "b": 2, "c": 3}, {"a": {"a": 1}}, {"a": {}}, {"a": None}, {"k": "p", "a": 1}, {"k": "q", "b": 1}),
)

INTEGER, STRING = {"type": "integer"}, {"type": "string"}
A = {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]}
CLOSED = {**A, "additionalProperties": False}
DEFS = {"$defs": {"i": INTEGER}}

ENFORCED: dict[str, Any] = {
    **{f"type {kind}": {"type": kind} for kind in ("string", "integer", "number", "boolean", "null")},
    "types": {"type": ["string", "integer"]},
    "nullable object": {**CLOSED, "type": ["object", "null"]},
    "const": {"const": 1},
    "const of its type": {"const": "a", "type": "string"},
    "const in enum": {"const": "a", "enum": ["a"], "type": "string"},
    "enum": {"enum": ["a", 1, None, "\u00e9"]},
    "enum of its type": {"type": "string", "enum": ["a", "b"]},
    "minLength": {"type": "string", "minLength": 2},
    "maxLength": {"type": "string", "maxLength": 2},
    "lengths": {"type": "string", "minLength": 1, "maxLength": 1},
    "no length": {"type": "string", "minLength": 0},
    "length of what may be a string": {"type": ["string", "integer"], "maxLength": 1, "minimum": 2},
    "length beside a reference's target": {
        "type": ["string", "object"],
        "maxLength": 2,
        "properties": {"a": INTEGER, "b": {"$ref": "#/properties/a"}},
        "additionalProperties": False,
    },
    "lengths beside the marks of lengths": {
        "anyOf": [{"const": "length0;"}, {"type": "string", "maxLength": 1}, {"$ref": "#/$defs/string_character"}],
        "$defs": {"string_character": {"type": "string", "minLength": 3, "maxLength": 3}},
    },
    "pattern": {"type": "string", "pattern": "^ab?$"},
    "open pattern": {"type": "string", "pattern": "b"},
    "alternatives": {"type": "string", "pattern": "^a|b$"},
    "whole alternatives": {"type": "string", "pattern": r"^a$|^(?:b|[$^]|\$)$"},
    "date": {"type": "string", "format": "date"},
    **{name: {"type": "string", "format": name} for name in ("time", "date-time", "duration", "email", "uri")},
    **{name: {"type": "string", "format": name} for name in ("ipv4", "ipv6", "uuid", "hostname")},
    "format of what may be a string": {"type": ["string", "null"], "format": "date"},
    "format of no string": {"type": "integer", "format": "int32"},
    "minimum": {"type": "integer", "minimum": 2},
    "maximum": {"type": "integer", "maximum": 2},
    "exclusiveMinimum": {"type": "integer", "exclusiveMinimum": 2},
    "exclusiveMaximum": {"type": "integer", "exclusiveMaximum": 2},
    "number's minimum": {"type": "number", "minimum": 2},
    "number's maximum": {"type": "number", "maximum": -0.5},
    "number's exclusiveMinimum": {"type": "number", "exclusiveMinimum": 1.5},
    "bounds of two types": {"type": ["integer", "string"], "minimum": 2, "minLength": 2},
    "items": {"type": "array", "items": INTEGER},
    "counted items": {"type": "array", "items": INTEGER, "minItems": 2, "maxItems": 3},
    "no items": {"type": "array", "items": False},
    "prefixItems": {"type": "array", "prefixItems": [INTEGER, STRING]},
    "exact prefixItems": {"type": "array", "prefixItems": [INTEGER, STRING], "items": False, "minItems": 2},
    "unevaluatedItems": {"type": "array", "prefixItems": [INTEGER], "unevaluatedItems": False},
    "uniqueItems off": {"type": "array", "items": INTEGER, "uniqueItems": False},
    "object": {"type": "object"},
    "properties": {"type": "object", "properties": {"a": INTEGER}},
    "properties without type": {"properties": {"a": INTEGER}, "required": ["a"]},
    "required": A,
    "closed": CLOSED,
    "empty": {"type": "object", "properties": {}, "additionalProperties": False},
    "additionalProperties": {"type": "object", "additionalProperties": STRING},
    "maxProperties": {"type": "object", "properties": {"a": {}, "b": {}}, "maxProperties": 1},
    "minProperties": {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 2},
    "unevaluatedProperties": {"type": "object", "properties": {"a": INTEGER}, "unevaluatedProperties": False},
    "nested": {"type": "object", "properties": {"a": CLOSED}, "required": ["a"], "additionalProperties": False},
    "anyOf": {"anyOf": [INTEGER, {"type": "null"}]},
    "oneOf of types": {"oneOf": [INTEGER, STRING]},
    "oneOf of the most branches": {"oneOf": [{"const": number} for number in range(128)]},
    "oneOf by property": {
        "oneOf": [
            {**CLOSED, "properties": {"k": {"const": "p"}, "a": INTEGER}, "required": ["k", "a"]},
            {**CLOSED, "properties": {"k": {"const": "q"}, "b": INTEGER}, "required": ["k", "b"]},
        ]
    },
    "allOf of one": {"allOf": [INTEGER], "description": "x"},
    "$ref": {"$ref": "#/$defs/i", "description": "x", **DEFS},
    "$ref into definitions": {"$ref": "#/definitions/i", "definitions": {"i": INTEGER}},
    "recursive": {
        "type": "object",
        "properties": {"a": {"anyOf": [{"$ref": "#"}, INTEGER]}},
        "additionalProperties": False,
    },
    "unknown keyword": {"type": "integer", "frobnicate": 3},
    "anything": {},
}

REFUSED: dict[str, Any] = {
    "not": {"type": "integer", "not": {"const": 1}},
    "if": {"type": "integer", "if": {"minimum": 2}, "then": {"maximum": 3}},
    "dependentRequired": {**A, "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {**A, "dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {**A, "dependencies": {"a": ["b"]}},
    "multipleOf": {"type": "integer", "multipleOf": 2},
    "uniqueItems": {"type": "array", "items": INTEGER, "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "patternProperties": {"type": "object", "patternProperties": {"^x": INTEGER}, "properties": {"xa": STRING}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 1}, "properties": {"ab": INTEGER}},
    r"\$anchor": {"$ref": "#/$defs/i", "$defs": {"i": {"$anchor": "i", "type": "integer"}}},
    r"\$dynamicRef": {"$dynamicRef": "#/$defs/i", **DEFS},
    r"\$id": {"properties": {"a": {"$id": "x", "type": "integer"}}},
    r"\$ref \"#i\" names no schema": {"$ref": "#i", **DEFS},
    r"\$ref \"#/default\" names no schema": {"$ref": "#/default", "default": {"not": {}}},
    r"\$ref \"other.json\" names no schema": {"$ref": "other.json"},
    r"maximum beside \$ref": {"$ref": "#/$defs/i", "maximum": 2, **DEFS},
    "minimum beside enum": {"enum": [1, 2, 3], "minimum": 2},
    "type beside const with a value": {"type": "string", "const": 1},
    "type beside enum with a value": {"type": "string", "enum": ["a", 1]},
    "enum beside const": {"const": 1, "enum": [2, 3]},
    "type beside anyOf": {"type": "integer", "anyOf": [{"type": "integer", "minimum": 5}]},
    "properties beside anyOf": {"properties": {"a": INTEGER}, "anyOf": [CLOSED]},
    "oneOf at #": {"oneOf": [{"type": "integer", "minimum": 1}, {"type": "integer", "maximum": 2}]},
    "oneOf at # has more than 128 branches": {"oneOf": [{"const": number} for number in range(129)]},
    "allOf of several": {"allOf": [A, {**A, "properties": {"b": INTEGER}, "required": ["b"]}]},
    "additionalProperties beside allOf": {**CLOSED, "allOf": [{"properties": {"b": INTEGER}}]},
    "minLength above maxLength": {"type": "string", "minLength": 2, "maxLength": 1},
    "minLength has the wrong type": {"type": "string", "minLength": "1"},
    "maxItems has the wrong type": {"type": "array", "maxItems": -1},
    "minItems that no answer reaches": {"type": "array", "minItems": 1 << 30},
    "minimum has the wrong type": {"type": "integer", "minimum": "1"},
    "maximum beyond 64 bits": {"type": "number", "maximum": 10**400},
    "minimum beyond 64 bits": {"type": "integer", "minimum": -1e30},
    "reference at .* leads back": {"anyOf": [{"$ref": "#"}, INTEGER]},
    "reference at .* leads back to itself": {"$ref": "#/$defs/i", "$defs": {"i": {"allOf": [{"$ref": "#/$defs/i"}]}}},
    "pattern beside a length": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 2},
    "format beside a length": {"type": "string", "format": "date", "maxLength": 2},
    'format "colour"': {"type": "string", "format": "colour"},
    "number must be told": {"minimum": 2},
    "string must be told": {"minLength": 2},
    "object must be told": {"required": ["a"]},
    'required names "b"': {**A, "required": ["a", "b"]},
    "items is false|items.*list|which is no schema": {"type": "array", "items": [INTEGER]},
    "#/properties/a is false": {"type": "object", "properties": {"a": False}},
    'unknown type "text"': {"type": "text"},
    "empty list of types": {"type": []},
    "minProperties beside additionalProperties": {"type": "object", "additionalProperties": {}, "minProperties": 2},
    r"pattern with the group \"\(\?!a": {"type": "string", "pattern": "^(?!a).*$"},
    r"pattern with the group \"\(\?=b": {"type": "string", "pattern": "^(?=b).*$"},
    r"pattern with \^ inside it": {"type": "string", "pattern": "a^b"},
    r"pattern with \$ inside it": {"type": "string", "pattern": "(a$)b"},
    "properties has the wrong type": {"type": "object", "properties": []},
    "anyOf has the wrong type": {"anyOf": []},
}


OF_KEYWORDS: dict[str, Any] = {
    "const": {"const": "a"},
    "enum": {"enum": ["a", 1, None]},
    "minLength": {"type": "string", "minLength": 2},
    "maxLength": {"type": "string", "maxLength": 2},
    "pattern": {"type": "string", "pattern": "^[^a]b?$"},
    "format": {"type": "string", "format": "date"},
    "contentEncoding": {"type": "string", "contentEncoding": "base64"},
    "contentMediaType": {"type": "string", "contentMediaType": "application/json"},
    "contentSchema": {"type": "string", "contentSchema": INTEGER},
    "integer": INTEGER,
    "minimum": {"type": "integer", "minimum": 2},
    "maximum": {"type": "number", "maximum": 10},
    "exclusiveMinimum": {"type": "number", "exclusiveMinimum": -1},
    "exclusiveMaximum": {"type": "integer", "exclusiveMaximum": 12},
    "multipleOf": {"type": "integer", "multipleOf": 2},
    "divisibleBy": {"type": "integer", "divisibleBy": 2},
    "boolean": {"type": "boolean"},
    "null": {"type": ["null", "string"]},
    "items": {"type": "array", "items": INTEGER},
    "items of old": {"type": "array", "items": [INTEGER]},
    "additionalItems": {"type": "array", "items": [INTEGER], "additionalItems": False},
    "prefixItems": {"type": "array", "prefixItems": [INTEGER, STRING]},
    "minItems": {"type": "array", "minItems": 1},
    "maxItems": {"type": "array", "maxItems": 2},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "minContains": {"type": "array", "contains": INTEGER, "minContains": 2},
    "maxContains": {"type": "array", "contains": INTEGER, "maxContains": 1},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "properties": {"type": "object", "properties": {"a": INTEGER, "b": STRING}},
    "required": A,
    "additionalProperties": {"type": "object", "properties": {"b": STRING}, "additionalProperties": INTEGER},
    "patternProperties": {"type": "object", "patternProperties": {"^a": STRING}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 1}},
    "minProperties": {"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1},
    "maxProperties": {"type": "object", "maxProperties": 1},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"type": "object", "dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {"type": "object", "dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "anyOf": {"anyOf": [INTEGER, CLOSED]},
    "oneOf": {"oneOf": [INTEGER, {"type": "string", "maxLength": 1}]},
    "oneOf that overlaps": {"oneOf": [{"minimum": 2, **INTEGER}, INTEGER]},
    "allOf": {"allOf": [STRING]},
    "allOf of two": {"allOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 9}]},
    "not": {"not": {"const": "a"}},
    "if": {"if": INTEGER, "then": {"minimum": 2}, "else": {"maxLength": 1}},
    "$ref": {"$ref": "#/$defs/i"},
    "$dynamicRef": {"$dynamicRef": "#/$defs/i"},
    "$recursiveRef": {"$recursiveRef": "#"},
    "$anchor": {"$anchor": "x"},
    "$id": {"$id": "http://a.b/c"},
    "$schema": {"$schema": "https://json-schema.org/draft/2020-12/schema"},
    "$vocabulary": {"$vocabulary": {}},
    "title": {"title": "x", "description": "x", "$comment": "x", "default": 1, "examples": [1], "deprecated": True},
    "discriminator": {"discriminator": {"propertyName": "a"}},
}
"""Each keyword of the drafts up to 2020-12, with the type that it is for."""


@pytest.fixture(scope="module")
def compiler() -> Any:
    """A compiler for a tokenizer whose tokens are bytes."""
    vocabulary = [*(bytes([one]) for one in range(END)), b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def accepts(grammar: Any, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return bool(matcher.accept_string(text) and matcher.accept_token(END))


LIKELY = b'"{}[]:,\\ntuab0123-. \t'
CLOSING = b'"}],:'


def walk(grammar: Any, chance: random.Random) -> str | None:
    """An answer that the grammar allows, byte by byte at random; None if it does not end in 200 of them."""
    matcher, mask, answer = xgrammar.GrammarMatcher(grammar), xgrammar.allocate_token_bitmask(1, END + 1), bytearray()
    while len(answer) < 200:
        matcher.fill_next_token_bitmask(mask)
        bits = np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")
        allowed = np.flatnonzero(bits[:END])
        if bits[END] and (not len(allowed) or chance.random() < 0.5):
            return answer.decode(errors="replace")
        likely = [one for one in (CLOSING if len(answer) > 50 else LIKELY) if bits[one]]
        token = int(chance.choice(likely if likely and chance.random() < 0.85 else allowed))
        assert matcher.accept_token(token)
        answer.append(token)
    return None


FORMATS = copy.deepcopy(jsonschema.Draft202012Validator.FORMAT_CHECKER)
FORMATS.checks("date-time", ValueError)(lambda one: not isinstance(one, str) or datetime.fromisoformat(one))
FORMATS.checks("time", ValueError)(lambda one: not isinstance(one, str) or datetime_time.fromisoformat(one))
FORMATS.checks("hostname")(lambda one: not isinstance(one, str) or re.fullmatch(r"[a-zA-Z0-9.\-]+", one))
FORMATS.checks("uri")(lambda one: not isinstance(one, str) or re.match(r"[a-zA-Z][a-zA-Z0-9+.\-]*:", one))
FORMATS.checks("duration")(
    lambda one: not isinstance(one, str) or re.fullmatch(r"P(?=.)(\d+[YMWD])*(T(\d+[HMS])+)?", one)
)


def forbidden(schema: Any, grammar: Any, answers: int, chance: random.Random) -> list[str]:
    """Which of some random answers are no JSON, or not of the schema."""
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    found = [one for one in (walk(grammar, chance) for _ in range(answers)) if one is not None]

    def valid(text: str) -> bool:
        try:
            return bool(validator.is_valid(json.loads(text)))
        except ValueError:
            return False

    return [one for one in found if not valid(one)]


@pytest.mark.parametrize("name", ENFORCED)
def test_what_is_taken_is_enforced(name: str, compiler: Any) -> None:
    schema = ENFORCED[name]
    assert unenforced(schema) == ""
    grammar = compiler.compile_grammar(ebnf(json.dumps(schema)))
    validator = jsonschema.Draft202012Validator(schema, format_checker=FORMATS)
    accepted = [one for one in VALUES if accepts(grammar, json.dumps(one, ensure_ascii=False))]
    assert accepted, "some answer is possible"
    assert [one for one in accepted if not validator.is_valid(one)] == []
    assert forbidden(schema, grammar, 30, random.Random(name)) == []


@pytest.mark.parametrize("keyword", OF_KEYWORDS)
def test_each_keyword_beside_each_other_is_enforced_or_refused(keyword: str, compiler: Any) -> None:
    chance = random.Random(keyword)
    for other in list(OF_KEYWORDS)[list(OF_KEYWORDS).index(keyword) :]:
        both = {**OF_KEYWORDS[keyword], **OF_KEYWORDS[other]}
        wide = {**both, "type": sorted({*_types(OF_KEYWORDS[keyword]), *_types(OF_KEYWORDS[other])})}
        places = (
            {**both, **DEFS},
            {**wide, **DEFS},
            {"type": "object", "properties": {"z": both}, "required": ["z"], "additionalProperties": False, **DEFS},
            {"type": "array", "items": {"anyOf": [both, {"type": "null"}]}, "minItems": 1, **DEFS},
            {
                "type": "object",
                "additionalProperties": {"$ref": "#/$defs/both"},
                "$defs": {"both": both, **DEFS["$defs"]},
            },
        )
        for schema in places:
            if unenforced(schema):
                continue
            try:
                grammar = compiler.compile_grammar(ebnf(json.dumps(schema)))
            except RuntimeError:
                continue  # refused when it is compiled, also before anything is generated
            assert forbidden(schema, grammar, 2, chance) == [], schema


def _types(schema: dict[str, Any]) -> list[str]:
    types = schema.get("type", ["string"])
    return [types] if isinstance(types, str) else types


def test_a_string_of_some_length_holds_any_character(compiler: Any) -> None:
    grammar = compiler.compile_grammar(ebnf(json.dumps({"type": "string", "minLength": 4, "maxLength": 4})))
    assert accepts(grammar, json.dumps('"\n\\\u00e9', ensure_ascii=False))
    assert not accepts(grammar, '"abc\x01"')
    assert not accepts(grammar, r'"ab\ud83d\ude00"'), "two escapes, one character"


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 65), (0, 128), (1, 64), (63, 129), (64, 64), (65, 200), (128, 128), (100, None), (300, 3000), (0, 1 << 62)],
)
def test_long_strings_have_their_length(low: int, high: int | None, compiler: Any) -> None:
    """Made of short repetitions: xgrammar takes seconds for each token of a long one, while all others wait."""
    schema = {"type": "string", "minLength": low} | ({} if high is None else {"maxLength": high})
    assert unenforced(schema) == ""
    text = ebnf(json.dumps(schema))
    assert all(int(count) <= 128 for count in re.findall(r"[{,](\d+)[,}]", text))
    grammar, most = compiler.compile_grammar(text), 1000 if high is None else min(high, 4000)
    for length in {0, 1, 63, 64, 65, low - 1, low, low + 1, most - 1, most, most + 1} - {-1}:
        right = low <= length and (high is None or length <= high)
        assert accepts(grammar, json.dumps("a" * length)) == right, length


def test_a_long_pattern_has_its_length(compiler: Any) -> None:
    grammar = compiler.compile_grammar(ebnf(json.dumps({"type": "string", "pattern": "^(?:a|b{3}){70,200}$"})))
    for length in (69, 70, 134, 135, 199, 200, 201):
        assert accepts(grammar, json.dumps("a" * (length - 2) + "bbbbbb")) == (70 <= length <= 200), length


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "(?:[a-z]|[0-9]){70,200}"),
        ("regex", "(?:(?:a|b){10}){7,20}"),
        ("grammar", 'root ::= y{70,200}\ny ::= [a{0, 99}] | "{0, 99}"'),
    ],
)
def test_long_repetitions_have_their_count(kind: str, value: str, compiler: Any) -> None:
    text = grammar.ebnf(kind, value)
    assert all(int(count) <= 128 for count in re.findall(r"\w\{\d+, ?(\d+)\}", text))
    compiled = compiler.compile_grammar(text)
    for count in (0, 60, 70, 130, 140, 200, 210):
        assert accepts(compiled, "a" * count) == (70 <= count <= 200), count
    if kind == "grammar":
        assert accepts(compiled, "{0, 99}" * 70), "texts and classes stay as they are"


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_enforced_is_refused_by_keyword(words: str) -> None:
    schema = REFUSED[words]
    for nested in (schema, {"type": "object", "properties": {"z": schema}}, {"type": "array", "items": schema}):
        if "$ref" in json.dumps(schema) or "oneOf" in schema or "is false" in words:
            nested = schema
        assert re.search(words, unenforced(nested))


@pytest.mark.parametrize("kind", ["json", "regex"])
def test_both_engines_refuse_before_they_compile(kind: Any, tmp_path: Path) -> None:
    value = '{"type": "integer", "not": {"const": 1}}' if kind == "json" else "a(?!b).*"
    guard = Guard(tmp_path, 1)  # compiling would look for a tokenizer there
    with pytest.raises(CogpressError, match=r"(json_schema|regex) cannot be enforced: (not at #|the group)"):
        guard.check(Structure(kind, value))


def test_vllm_has_one_backend(tiny_base: Path) -> None:
    chosen = vllm.options(tiny_base, Serve(), 4, 0, 0, None)
    assert chosen["structured_outputs_config"] == {"backend": "xgrammar"}
