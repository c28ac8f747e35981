"""Where a version runs: parse the sources that scripts/playground is given, and open the backend of each."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import urlsplit

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.playground.backend import Backend, Cog, Rewrite
from cogpress.playground.remote import ReplicateBackend
from cogpress.playground.servers import OnDemandServer, ServerPool
from cogpress.serve import model as serving


class Sources:
    """Opens backends."""

    def __init__(self, pool: ServerPool, root: Path, rewrite: Rewrite) -> None:
        """Opens nothing yet.

        Args:
            pool: runs the servers of folders of weights.
            root: the project's folder, whose runner serves them.
            rewrite: applied to inputs.
        """
        self.root = root
        self._pool, self._rewrite = pool, rewrite

    def open(self, source: str) -> Backend:
        """The backend of a version's source.

        Raises:
            CogpressError: it is not a source, or Replicate's token is missing.
        """
        if source.startswith(("http://", "https://")):
            return Cog(source, None, self._rewrite)
        if source.startswith("replicate:"):
            return ReplicateBackend(source.removeprefix("replicate:"))
        if source.startswith("folder:"):
            weights = source.removeprefix("folder:") or None
            name = f"server-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
            return OnDemandServer(self._pool, self.root, weights, name, self._rewrite)
        raise CogpressError(f"{source!r} is neither a URL, replicate:owner/name nor folder:PATH.")


def models(
    root: Path, settings: config.Config, url: str | None, named: list[str], weights: str | None
) -> tuple[tuple[str, str], ...]:
    """(NAME or NAME:LABEL, source) of each version to serve.

    Args:
        root: the project's folder.
        settings: its configuration.
        url: the default model's server, unless it is the project's own.
        named: NAME=SOURCE or NAME:LABEL=SOURCE pairs.
        weights: what the project's own server serves.

    Raises:
        CogpressError: a pair or a source is not valid.
    """
    found = []
    if url is not None:
        found.append((settings.name, parse(url)))
    elif weights is not None or not named:
        found.append((settings.name, parse(serving.find_weights(weights, root, settings.serve))))
    for pair in named:
        name, equals, text = pair.partition("=")
        if not equals or not name or not text:
            raise CogpressError(f"--model {pair}: write --model NAME=SOURCE or NAME:LABEL=SOURCE.")
        found.append((name, parse(text)))
    return tuple(found)


def parse(text: str) -> str:
    """A source as users write it, in the form of `Version.source`.

    Raises:
        CogpressError: it is not a source.
    """
    if text.startswith("replicate:"):
        parts = text.removeprefix("replicate:").partition(":")[0].split("/")
        if len(parts) != 2 or not all(parts):
            raise CogpressError(f"{text!r} is not replicate:owner/name or replicate:owner/name:version.")
        return text
    if text.startswith(("http://", "https://")):
        return cog(text)
    if text.startswith("hf://"):
        return f"folder:{text}"
    folder = Path(text).expanduser().resolve()
    if not folder.exists():
        raise CogpressError(f"There are no weights at {folder}. Run scripts/train, or name others.")
    return f"folder:{folder}"


def cog(text: str) -> str:
    """A Cog server's address.

    Raises:
        CogpressError: it is none.
    """
    try:
        found = urlsplit(text)
        right = found.scheme in ("http", "https") and found.hostname and found.port != 0
        if right and not found.username and not found.query:
            return text.rstrip("/")
    except ValueError:
        pass
    raise CogpressError("Give a Cog server's address as http://HOST:PORT, without a password or query.")
