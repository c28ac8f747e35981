"""Find secrets and private data by token formats, high-entropy values of telling names, and file names.

A find is a kind and a line, never the secret.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from cogpress.redact import PATTERNS

_NAMED = re.compile(
    r"(?i)\b[\w.-]*(api[_-]?key|secret|passwd|password|credential|auth[_-]?token|access[_-]?token|private[_-]?key|"
    r"[_-]token)\b[\"']?\s*[:=]\s*[\"']?(?P<value>[A-Za-z0-9+/_=.~-]{16,})"
)
"""A name that suggests a secret, with a value."""

CHANCE = 3.5
"""Bits of entropy per character: random letters and digits of 20 characters have about 4, words about 3."""

_NAMES = re.compile(
    r"\.env(\..*)?|.*\.env|\.netrc|_netrc|\.pypirc|\.npmrc|\.git-credentials|credentials(\.json)?|"
    r"id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk)|service[_-]?account.*\.json|"
    r"token(s)?(\.txt)?|secrets?\.(txt|json|ya?ml|toml)|htpasswd|\.htpasswd"
)
_EXAMPLES = re.compile(r".*\.(example|sample|template)")

_DATA = {".jsonl", ".csv", ".tsv", ".parquet", ".sqlite", ".sqlite3", ".db", ".xlsx", ".arrow", ".mbox", ".eml"}

_MAIL = re.compile(r"\b[A-Za-z0-9._%+-]+@(?!example\.|users\.noreply\.)[A-Za-z0-9-]+\.[A-Za-z]{2,}\b")

MANY_ADDRESSES = 20
"""E-mail addresses in one file above which it looks like personal data."""


@dataclass(frozen=True)
class Find:
    """A kind of secret and the line that it is on."""

    kind: str
    line: int


def in_text(text: str) -> Iterator[Find]:
    """Each secret in a text, once per kind and line."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > 100_000:
            continue  # not written by a person: a vocabulary, a notebook's picture
        kinds = [kind for kind, form in PATTERNS.items() if form.search(line)]
        if not kinds and any(_by_chance(match["value"]) for match in _NAMED.finditer(line)):
            kinds = ["a value that looks like a secret"]
        yield from (Find(kind, number) for kind in kinds)


def _by_chance(value: str) -> bool:
    """Whether a value looks generated: high entropy, letters and digits mixed."""
    mixed = any(letter.isdigit() for letter in value) and any(letter.isalpha() for letter in value)
    return mixed and entropy(value) >= CHANCE and not re.fullmatch(r"[\w-]*(\.[A-Za-z_]\w*)+", value)


def entropy(text: str) -> float:
    """Shannon entropy in bits per character."""
    counts = Counter(text).values()
    return -sum(count / len(text) * math.log2(count / len(text)) for count in counts) if text else 0.0


def by_name(name: str) -> str | None:
    """The kind of secret that a file's name suggests; None if it suggests none."""
    last = PurePosixPath(name).name
    if _EXAMPLES.fullmatch(last):
        return None
    return "a file for secrets" if _NAMES.fullmatch(last.lower()) else None


def is_data(name: str) -> bool:
    """Whether a file has a format that personal data comes in."""
    path = PurePosixPath(name)
    return path.suffix.lower() in _DATA or path.name.lower().endswith((".jsonl.gz", ".csv.gz"))


def addresses(text: str) -> int:
    """Number of different e-mail addresses in a text."""
    return len(set(_MAIL.findall(text)))
