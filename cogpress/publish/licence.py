"""The base model's public name, licence and languages, for the card of weights that derive from it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from cogpress.errors import CogpressError
from cogpress.weights import embedded

EMBEDDED_HUB_NAME = f"HuggingFaceTB/{embedded.MODEL}"

CardData = Callable[[str, str | None], dict[str, Any]]
"""Reads the metadata of a repository's model card from the Hub, given name and revision."""

_IDENTIFIER = r"[a-z0-9][a-z0-9.+-]{0,60}"
_HUB_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_LICENCE_TEXTS = {
    "apache-2.0": r"Apache License\s+Version 2\.0",
    "mit": r"Permission is hereby granted, free of charge, to any person obtaining a copy",
}
"""A pattern of a licence's text by the Hub's identifier."""


@dataclass(frozen=True)
class Licence:
    """A licence by the Hub's identifier; `other` has a name and a link."""

    identifier: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True)
class Origin:
    """A base model: the name `shown` to people, and `hub_name` if it is on the Hub."""

    shown: str
    hub_name: str | None = None
    licence: Licence | None = None
    languages: tuple[str, ...] = ()


def public_name(source: str) -> str:
    """A `base.source` for the public: a folder's last name only, a URL without user and query."""
    if source == "embedded" or source.startswith("hf://"):
        return source
    if source.startswith("https://"):
        parts = urlsplit(source)
        return f"https://{parts.hostname}{parts.path}"
    return PurePosixPath(source).name or "a local folder"


def find_origin(source: str, card_data: CardData) -> Origin:
    """Name, licence and languages of a base.

    Args:
        source: `base.source` of the training's configuration.
        card_data: called for a base from the Hub.

    Raises:
        CogpressError: the Hub cannot be reached.
    """
    if source == "embedded":
        return Origin(embedded.MODEL, EMBEDDED_HUB_NAME, Licence("apache-2.0"), ("en",))
    if source.startswith("hf://"):
        repo, _, revision = source.removeprefix("hf://").partition("@")
        data = card_data(repo, revision or None)
        return Origin(repo, repo if re.fullmatch(_HUB_NAME, repo) else None, _licence(data), _languages(data))
    folder = Path(source).expanduser()
    shown = public_name(source)
    if source.startswith("https://") or not folder.is_dir():
        return Origin(shown)
    data = _front_matter(folder / "README.md")
    return Origin(shown, None, _licence(data) or _licence_file(folder), _languages(data))


def named_licence(given: str) -> Licence:
    """The licence that a user names.

    Raises:
        CogpressError: it does not look like one of the Hub's identifiers.
    """
    if not re.fullmatch(_IDENTIFIER, given):
        raise CogpressError(
            f"--license {given!r} is not one of the Hub's identifiers, such as apache-2.0, llama3.1 or other."
        )
    return Licence(given)


def _front_matter(path: Path) -> dict[str, Any]:
    import yaml
    from huggingface_hub.repocard import metadata_load

    try:
        return metadata_load(path) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _licence(data: dict[str, Any]) -> Licence | None:
    identifier = data.get("license")
    if not isinstance(identifier, str) or not re.fullmatch(_IDENTIFIER, identifier):
        return None
    name, link = (data.get(key) if isinstance(data.get(key), str) else None for key in ("license_name", "license_link"))
    # A link that is no URL names a file of the base's repository, which is not in ours.
    return Licence(identifier, name, link if link and re.match(r"https?://\S+$", link) else None)


def _licence_file(folder: Path) -> Licence | None:
    for path in sorted(folder.glob("LICENSE*")):
        text = path.read_bytes()[:3000].decode("utf-8", errors="replace")
        for identifier, written in _LICENCE_TEXTS.items():
            if re.search(written, text):
                return Licence(identifier)
    return None


def _languages(data: dict[str, Any]) -> tuple[str, ...]:
    given = data.get("language")
    listed = [given] if isinstance(given, str) else given if isinstance(given, list) else []
    return tuple(item for item in listed if isinstance(item, str) and re.fullmatch(r"[a-z]{2,3}|multilingual", item))
