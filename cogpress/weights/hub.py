"""A model from the Hugging Face Hub: which of its files are needed, fetched and cached by the Hub's own client."""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from cogpress.errors import CogpressError, reason
from cogpress.source import Source
from cogpress.weights import download, manifest, tensors
from cogpress.weights.filenames import HUB_FILES, INDEX, PICKLES, SINGLE, TEMPLATES, VERIFICATION_FILES, refuse_pickle


def prepare() -> None:
    """Import the client, whose parts are loaded at their first use, before an engine's imports begin in a thread."""
    import huggingface_hub  # noqa: F401
    from huggingface_hub import errors, hf_hub_download, snapshot_download  # noqa: F401


def snapshot(wanted: Source, *, weights: bool = True) -> Path:
    """The folder of a repository's revision with the files that are needed, resumed after a cut, not yet checked.

    A snapshot that is in the client's cache is used when the Hub cannot be reached.

    Args:
        wanted: the repository.
        weights: fetch these too, and not only configuration and tokenizer.

    Raises:
        CogpressError: there is no such model, the Hub refuses or cannot be reached, or the disk has no room.
    """
    from huggingface_hub import constants, snapshot_download

    def client(**options: Any) -> Any:
        return snapshot_download(wanted.repository, revision=wanted.revision, **options)

    try:
        listed = {info.filename: info for info in client(dry_run=True)}
    except (OSError, ValueError) as error:
        refused = _unavailable(wanted, error.__cause__ or error)
        try:
            folder = Path(client(local_files_only=True, allow_patterns=["config.json"]))
        except (OSError, ValueError):
            raise refused from None
        print(f"{refused} Using the copy fetched before.", file=sys.stderr, flush=True)
        return folder
    names = _needed(wanted, listed.keys()) if weights else sorted(_settings(listed.keys()))
    missing = sum(listed[name].file_size for name in names if listed[name].will_download)
    download.check_room(Path(constants.HF_HUB_CACHE), missing)
    try:
        return Path(client(allow_patterns=[glob.escape(name) for name in names]))
    except (OSError, ValueError) as error:
        raise _unavailable(wanted, error) from None


def file(wanted: Source, name: str) -> Path:
    """One file of a repository, in the client's cache beside the others that are there.

    Raises:
        CogpressError: there is no such model or file, or the Hub refuses or cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(wanted.repository, name, revision=wanted.revision))
    except (OSError, ValueError) as error:
        raise _unavailable(wanted, error) from None


def _needed(wanted: Source, listed: Iterable[str]) -> list[str]:
    """Which of a repository's files to fetch: those of its manifest, else one set of weights and the settings."""
    names = set(listed)
    top = {name for name in names if "/" not in name}
    weights = {name for name in top if name.endswith(".safetensors")}
    if not weights:
        for name in sorted(top):
            refuse_pickle(PurePosixPath(name), wanted.text)
        raise CogpressError(
            f"{wanted.text} holds no .safetensors file, which is all that cogpress loads. Name another."
        )
    if manifest.NAME in names and (ours := _manifest_files(wanted)):
        needed = {manifest.NAME, *ours, *names.intersection(VERIFICATION_FILES)}
    else:
        settings = _settings(names)
        # Some repositories hold the same weights again under other names.
        if INDEX in names:
            weights = set(tensors.shards(file(wanted, INDEX).parent))
        elif SINGLE in names:
            weights = {SINGLE}
        needed = weights | settings - {manifest.NAME}
    if missing := sorted(needed - names):
        raise CogpressError(f"{wanted.text} lacks {missing[0]}, which its own list of files names. Name another model.")
    return sorted(needed)


def _settings(names: Iterable[str]) -> set[str]:
    """Which of a repository's files are its configuration, its tokenizer and their licence."""
    usual = {name for name in names if "/" not in name and PurePosixPath(name).suffix not in {*PICKLES, ".safetensors"}}
    named = {name for name in names if name.rpartition("/")[0] == TEMPLATES and name.endswith(".jinja")}
    return {name for name in usual | named if any(fnmatch(name, form) for form in HUB_FILES)}


def _manifest_files(wanted: Source) -> dict[str, int]:
    """What a repository's manifest lists; nothing where the file of that name is another program's."""
    path = file(wanted, manifest.NAME)
    try:
        return manifest.listed(path.parent, str(path))
    except CogpressError:
        return {}


def _unavailable(wanted: Source, error: BaseException) -> CogpressError:
    # An address that the Hub redirects to is signed.
    why = re.sub(r"\?\S+", "", reason(error)).rstrip(".")
    return CogpressError(
        f"Could not download {wanted.text} from the Hub: {why}. Check the name and the network; for a "
        "private or gated model set HF_TOKEN."
    )
