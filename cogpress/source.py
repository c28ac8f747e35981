"""The syntax of a model's source: a folder, a tar, a repository on the Hub, a tar or a published folder on the web."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cogpress.errors import CogpressError

FORMS = "a folder, a tar, hf://organisation/name@revision, https://….tar or https://…/manifest.json"
"""The forms, for error messages."""

_HUB = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^\s@]+))?")


@dataclass(frozen=True)
class Source:
    """A parsed source.

    Attributes:
        kind: `path`, `hub`, `tar` (a URL of one), or `files` (the URL of a published folder's manifest).
        text: as it was given; it can hold a signature or a password, so messages use `shown`.
        repository: on the Hub, `organisation/name`.
        revision: on the Hub; None for the default branch.
    """

    kind: Literal["path", "hub", "tar", "files"]
    text: str
    repository: str = ""
    revision: str | None = None

    @property
    def shown(self) -> str:
        """The source without what can be secret."""
        return shown(self.text)


def parse(text: str) -> Source:
    """Parse a source.

    Raises:
        CogpressError: it has none of the forms, or is plain HTTP from another machine.
    """
    text = text.strip()
    if not text:
        raise CogpressError(f"The model's source is empty. Name {FORMS}.")
    if text.startswith("hf://"):
        match = _HUB.fullmatch(text)
        if match is None:
            raise CogpressError(f"{text!r} is not hf://organisation/name or hf://organisation/name@revision.")
        return Source("hub", text, match["repository"], match["revision"])
    if "://" not in text:
        return Source("path", text)
    if not allowed(text):
        raise CogpressError(
            f"{shown(text)} cannot be a source: it must be https (plain http only from this machine). Name {FORMS}."
        )
    return Source("files" if urlsplit(text).path.endswith("/manifest.json") else "tar", text)


def under(text: str, root: Path) -> str:
    """A source whose path, if it is one, is relative to a folder."""
    return str(root / text) if parse(text).kind == "path" else text


def allowed(url: str) -> bool:
    """Whether a URL may be requested: https, or http from this machine."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return False
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host)))


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine itself."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one on the internet, rather than this machine's or its network's.

    Args:
        address: as `socket.getaddrinfo` gives it.
    """
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        elif found.sixtofour is not None or found.teredo is not None or found in _NAT64:
            return False  # a tunnel to an IPv4 address, which may be a private one
    return found.is_global and not found.is_multicast


def shown(text: str) -> str:
    """A source for messages: a URL without user, password, query and fragment, which can hold secrets."""
    scheme, mark, rest = text.partition("://")
    if not mark or scheme == "hf":
        return text
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
