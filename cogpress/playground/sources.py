"""What scripts/playground is asked to serve, understood; and what it says when it is ready."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.playground.web import Parts
from cogpress.serve import model as serving


def models(
    root: Path, settings: config.Config, url: str | None, named: list[str], weights: str | None
) -> tuple[tuple[str, str], ...]:
    """(name or name:label, source) of each version to serve, as `Catalog.add` takes them.

    Args:
        root: the project's folder.
        settings: its configuration.
        url: the default model's server, where it is not the project's own.
        named: NAME=SOURCE or NAME:LABEL=SOURCE pairs.
        weights: what the project's own server serves.

    Raises:
        CogpressError: a pair or a source can not be understood.
    """
    found = []
    if url is not None:
        found.append((settings.name, source(url)))
    elif weights is not None or not named:
        found.append((settings.name, source(serving.find_weights(weights, root, settings.serve))))
    for pair in named:
        name, equals, text = pair.partition("=")
        if not equals or not name or not text:
            raise CogpressError(f"--model {pair}: write --model NAME=SOURCE or NAME:LABEL=SOURCE.")
        found.append((name, source(text)))
    return tuple(found)


def source(text: str) -> str:
    """A source as the catalog has it.

    Raises:
        CogpressError: it is none.
    """
    if text.startswith("replicate:"):
        parts = text.removeprefix("replicate:").partition(":")[0].split("/")
        if len(parts) != 2 or not all(parts):
            raise CogpressError(f"{text!r} is not replicate:owner/name or replicate:owner/name:version.")
        return text
    if text.startswith(("http://", "https://")):
        try:
            found = urlsplit(text)
            if found.hostname and not found.username and not found.query and found.port != 0:
                return text.rstrip("/")
        except ValueError:
            pass
        raise CogpressError("The address of a Cog server is http://HOST:PORT, without a password and a query.")
    if text.startswith("hf://"):
        return f"folder:{text}"
    folder = Path(text).expanduser().resolve()
    if not folder.exists():
        raise CogpressError(f"There are no weights at {folder}. Make some with scripts/train, or name others.")
    return f"folder:{folder}"


def greeting(parts: Parts, host: str, port: int) -> str:
    """Where it answers, and how clients are pointed at it."""
    shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    base = f"http://{shown}:{port}"
    names = ", ".join(name for name, model in parts.catalog.models.items() if model.versions)
    return (
        f"Ready at {base} with {names}. Stop with Ctrl-C.\n"
        f"  Replicate's Python client: REPLICATE_BASE_URL={base}   JavaScript: baseUrl {base}/v1   "
        f"OpenAI's: base_url {base}/v1"
    )
