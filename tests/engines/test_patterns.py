"""Patterns of schemas allow what Python's `re` finds, as JSON strings."""

from __future__ import annotations

import itertools
import json
import random
import re
from typing import Any

import pytest
import xgrammar

from cogpress.engines import patterns

END = 256


def matcher(pattern: str) -> Any:
    vocabulary = [*(bytes([one]) for one in range(END)), b"</s>"]
    info = xgrammar.TokenizerInfo(vocabulary, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END])
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    return compiler.compile_grammar(f'root ::= "\\"" {patterns.ebnf(pattern)} "\\""\n{patterns.RULES}')


def accepts(grammar: Any, text: str) -> bool:
    found = xgrammar.GrammarMatcher(grammar)
    return bool(found.accept_string(json.dumps(text, ensure_ascii=False)) and found.accept_token(END))


def expression(chance: random.Random, depth: int = 0) -> str:
    kind = chance.random() if depth < 4 else 0.0
    if kind < 0.3:
        one = chance.choice(["a", "b", "c", "[ab]", "[^a]", ".", r"\w", "[b-c]"])
    elif kind < 0.6:
        one = f"({chance.choice(['?:', ''])}{expression(chance, depth + 1)})"
    elif kind < 0.8:
        return expression(chance, depth + 1) + expression(chance, depth + 1)
    else:
        return f"(?:{expression(chance, depth + 1)}|{expression(chance, depth + 1)})"
    return one + (chance.choice(["?", "*", "+", "{2}", "{1,2}", "{2,}", "+?", "*?"]) if chance.random() < 0.45 else "")


def test_random_expressions_allow_what_they_match() -> None:
    chance = random.Random(0)
    texts = ["".join(one) for length in range(5) for one in itertools.product("abc", repeat=length)]
    for _ in range(250):
        pattern = chance.choice(["", "^"]) + expression(chance) + expression(chance) + chance.choice(["", "$"])
        grammar = matcher(pattern)
        assert [text for text in texts if accepts(grammar, text)] == [
            text for text in texts if re.search(pattern, text)
        ]


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "^a(?:b+c)?$",
            "^.+(?:b.{0,1}|b)$",
            "^a$|^b$|c",
            "^$",
            "",
            "^|$",
            "^[^\\s]+$",
            r"^\S\D\W?$",
            r"^[\s\S]$",
        ),
        *(
            r"^[\x20-\x7e]{2}$",
            r'^"\\$',
            r"^\n[\t]$",
            "^[\\u00e0-\\u00ff]$",
            r"^[!-\]]$",
            "^\U0001f600.$",
            r"^\/[*+]{1,2}$",
        ),
    ],
)
def test_characters_are_those_of_the_text_and_no_escapes(pattern: str) -> None:
    grammar = matcher(pattern)
    texts = [
        "",
        *("a", "b", "c", "ab", "abc", "aab", "abb", '"', "\\", '"\\', "\n\t", "é", "😀", "😀a", "]", "/*", "/+"),
        " 1-",
    ]
    assert [one for one in texts if accepts(grammar, one)] == [one for one in texts if re.search(pattern, one)]


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        *(
            ("(?=a)", "the group"),
            ("(?i)a", "the group"),
            ("(?P<x>a)", "the group"),
            ("a^", r"\^ inside"),
            ("(a$)", r"\$ inside"),
        ),
        *(
            (r"(a)\1", "groupref"),
            (r"\bfoo", "an anchor inside"),
            ("a++", "possessive"),
            (r"a\Z", "Z"),
            ("a{,2}", "{,"),
            ("(", "an error"),
        ),
        *(
            (r"\p{L}", "an error"),
            ("^\x00$", "a class of characters that JSON cannot hold"),
            ("[^]a]", "[^]"),
            ("(" * 9999, "an error"),
        ),
        (f"a{{{10**20}}}", "an error"),
    ],
)
def test_what_is_not_enforced_is_named(pattern: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said) if said in ("[^]", "{,") else said):
        patterns.ebnf(pattern)
