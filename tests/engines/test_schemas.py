"""A JSON schema is enforced or refused: what the grammar accepts is compared with a validator."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import xgrammar

from cogpress.config import Serve
from cogpress.engines import vllm
from cogpress.engines.base import Structure
from cogpress.engines.grammar import MAX_WHITESPACE, Guard, unenforced
from cogpress.errors import CogpressError

END = 256

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, 5, 10, -1, 1.5, 2.5, "", "a", "b", "ab", "abc", "abcd", "\u00e9", "2020-01-01"),
    *("a@b.co", "1.2.3.4", [], [1], [1, 1], [1, 2], [1, "a"], ["a"], ["a", 1], [1, 2, 3], [1, 2, 3, 4], [None], {}),
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
    "pattern": {"type": "string", "pattern": "^ab?$"},
    "open pattern": {"type": "string", "pattern": "b"},
    "alternatives": {"type": "string", "pattern": "^a|b$"},
    "whole alternatives": {"type": "string", "pattern": r"^a$|^(?:b|[$^]|\$)$"},
    "date": {"type": "string", "format": "date"},
    "email": {"type": "string", "format": "email"},
    "ipv4": {"type": "string", "format": "ipv4"},
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
    "allOf of several": {"allOf": [A, {**A, "properties": {"b": INTEGER}, "required": ["b"]}]},
    "additionalProperties beside allOf": {**CLOSED, "allOf": [{"properties": {"b": INTEGER}}]},
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


@pytest.fixture(scope="module")
def compiler() -> Any:
    """A compiler for a tokenizer whose tokens are bytes."""
    vocabulary = [*(bytes([one]) for one in range(END)), b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def accepts(grammar: Any, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return bool(matcher.accept_string(text) and matcher.accept_token(END))


@pytest.mark.parametrize("name", ENFORCED)
def test_what_is_taken_is_enforced(name: str, compiler: Any) -> None:
    schema = ENFORCED[name]
    assert unenforced(schema) == ""
    grammar = compiler.compile_json_schema(json.dumps(schema), any_whitespace=True, max_whitespace_cnt=MAX_WHITESPACE)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    accepted = [one for one in VALUES if accepts(grammar, json.dumps(one, ensure_ascii=False))]
    assert accepted, "some answer is possible"
    assert [one for one in accepted if not validator.is_valid(one)] == []


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_not_enforced_is_refused_by_keyword(words: str) -> None:
    schema = REFUSED[words]
    for nested in (schema, {"type": "object", "properties": {"z": schema}}, {"type": "array", "items": schema}):
        if "$ref" in schema or "oneOf" in schema or "is false" in words:
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
