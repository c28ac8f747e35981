"""The state of a folder of weights: its manifest (origin and the sha256 of every file), and whether it is verified."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import cogpress
from cogpress.errors import CogpressError
from cogpress.files import is_file, read_json, sha256, write_json
from cogpress.weights.filenames import (
    ADAPTER,
    COMPILED,
    INDEX,
    MAX_NAME,
    VERIFICATION,
    VERIFICATION_FILES,
    is_taken,
    safe_name,
    serving_files,
)

NAME = "manifest.json"
FORMAT = 1

MAX_FILES = 10_000
"""More files than any model has."""

WRITTEN = ("format", "kind", "cogpress", "created_at", "files")
"""What `write` adds to the facts that it is given."""

_ADDED = (NAME, *VERIFICATION_FILES, "README.md", "LICENSE", ".gitattributes")
"""Files that may be added to a folder after its manifest was written."""

State = Literal["verified", "failed", "changed", "unverified"]

STATE_MESSAGES = {
    "verified": "The weights are verified.",
    "failed": "The weights FAILED verification: their answers are not those that training scored.",
    "changed": "The weights have CHANGED since they were verified. Run scripts/verify.",
    "unverified": "The weights are not verified. Run scripts/verify.",
}
"""What a server logs about a state."""


def hashes(folder: Path, names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """`{relative path: {"sha256": ..., "bytes": ...}}` of a folder's files, the manifest itself left out."""
    if names is None:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {
        name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
        for name in names
        if name != NAME
    }


def fingerprint(folder: Path) -> str:
    """One sha256 for all safetensors files of a model folder; it changes when any weight does."""
    shards = list(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(4) as pool:
        return _fingerprint(dict(zip([path.name for path in shards], pool.map(sha256, shards), strict=True)))


def recorded_fingerprint(content: dict[str, Any]) -> str:
    """The `fingerprint` of a folder according to its manifest, without reading the weights."""
    files = content.get("files") or {}
    return _fingerprint({name: files[name]["sha256"] for name in files if re.fullmatch(r"[^/]+\.safetensors", name)})


def _fingerprint(found: dict[str, str]) -> str:
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}:{found[name]}\n".encode())
    return digest.hexdigest()


def write(
    folder: Path, kind: str, facts: dict[str, Any], *, known: dict[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Hash every file of a finished folder and write its manifest, last and atomically.

    Args:
        folder: the complete folder.
        kind: `weights` or `adapter`.
        facts: how the folder was made; JSON-serializable.
        known: sha256 and bytes of files that were hashed while they were written.
    """
    known = known or {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    others = hashes(folder, [name for name in names if name not in known])
    content = {
        "format": FORMAT,
        "kind": kind,
        "cogpress": cogpress.__version__,
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **facts,
        "files": dict(sorted((others | known).items())),
    }
    write_json(folder / NAME, content)
    return content


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none or the file of that name is another program's.

    Raises:
        CogpressError: it is not JSON, is of a later format, or lists files without what `write` says of each.
    """
    try:
        content = read_json(folder / NAME)
    except FileNotFoundError:
        return None
    except ValueError:
        raise CogpressError(f"{folder / NAME} is not JSON. Fetch or merge the weights again.") from None
    if isinstance(content, dict) and "cogpress" not in content:
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CogpressError(f"{folder / NAME} has a format that this version does not know. Update cogpress.")
    files = content.get("files", {})
    for name, facts in files.items() if isinstance(files, dict) else [("files", files)]:
        if not (isinstance(facts, dict) and isinstance(facts.get("sha256"), str) and type(facts.get("bytes")) is int):
            raise CogpressError(f"{folder / NAME} lists {name[:80]!r} without sha256 and bytes. Fetch them again.")
    return content


def check(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare a folder with its manifest: every file has the recorded size and sha256, and no other is there.

    Raises:
        CogpressError: naming the first file that differs.
    """
    recorded = manifest.get("files")
    if not isinstance(recorded, dict) or not recorded:
        raise CogpressError(f"{folder / NAME} lists no files. Fetch or merge the weights again.")
    for name in recorded:
        if not is_file(folder / name):
            shown = name if len(name) < 2 * MAX_NAME and name.isprintable() else ascii(name)[:80]
            raise CogpressError(f"{folder} lacks {shown}, which its manifest lists. Fetch or merge the weights again.")

    def agrees(name: str) -> bool:
        path, facts = folder / name, recorded[name]
        return path.stat().st_size == facts["bytes"] and sha256(path) == facts["sha256"]

    # A disk reads faster than one thread hashes.
    with ThreadPoolExecutor(4) as pool:
        for name, good in zip(recorded, pool.map(agrees, recorded), strict=True):
            if not good:
                raise CogpressError(
                    f"{folder / name} is not the file that was written: its sha256 differs from the manifest's. "
                    "Fetch or merge the weights again."
                )
    extra = unlisted(folder, recorded)
    if extra:
        raise CogpressError(f"{folder} holds {extra[0]}, which its manifest does not list. Remove it.")


def unlisted(folder: Path, recorded: Iterable[str]) -> list[str]:
    """Files of a folder that its manifest does not list, such as a chat template that was added later.

    Reports, pages for people, the adapter that the weights were made with and the folder of compiled code change no
    answer and may be added.
    """
    known = {*recorded, *_ADDED}
    names = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(name) for name in names if str(name) not in known and name.parts[0] not in (ADAPTER, COMPILED))


def listed(folder: Path, shown: str) -> dict[str, int]:
    """`{name: bytes}` of the files that an untrusted manifest lists.

    Args:
        folder: where the manifest is.
        shown: what messages call it.

    Raises:
        CogpressError: it is no manifest, or names a file that must not be fetched.
    """
    try:
        files = (read(folder) or {}).get("files")
    except CogpressError as error:
        raise CogpressError(str(error).replace(str(folder / NAME), shown)) from None
    if not isinstance(files, dict) or not 0 < len(files) <= MAX_FILES:
        raise CogpressError(f"{shown} lists no files, so it is not a manifest of weights. Check the URL.")
    sizes = {}
    for name, facts in files.items():
        if (
            str(safe_name(name, shown)) != name
            or not isinstance(facts, dict)
            or type(facts.get("bytes")) is not int
            or facts["bytes"] < 0
            or not re.fullmatch("[0-9a-f]{64}", str(facts.get("sha256")))
        ):
            raise CogpressError(f"{shown} lists {name[:80]!r} without a plain name, bytes, sha256. Publish it again.")
        sizes[name] = facts["bytes"]
    refuse_strange(sizes, shown)
    return sizes


def refuse_strange(names: Iterable[str], shown: str) -> None:
    """Refuse a foreign manifest that lists a file that no model has.

    Raises:
        CogpressError: with its name, or because the name is none or is one of a file that runs code.
    """
    for name in names:
        if not is_taken(str(safe_name(name, shown))):
            raise CogpressError(
                f"{shown} lists {name[:80]!r}, which is no file of a model in safetensors. Remove it from the weights "
                "and merge or publish them again."
            )


def signed_files(folder: Path) -> dict[str, str]:
    """The sha256 of every file that a verification covers: the manifest's, or all that an engine reads.

    Raises:
        OSError: a file that the manifest lists is not there.
        CogpressError: as `read`.
    """
    facts = read(folder)
    if facts is not None:
        names = sorted(facts.get("files", {}))
    else:
        names = sorted(path.name for path in folder.iterdir() if path.suffix == ".safetensors")
        names += serving_files(folder)
        names += [INDEX] if (folder / INDEX).is_file() else []
    return {name: found["sha256"] for name, found in hashes(folder, names).items()}


def weights_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def read_verification(folder: Path) -> dict[str, Any] | None:
    """A folder's verification report; None where there is none.

    Raises:
        CogpressError: the file is something else.
    """
    try:
        content = read_json(folder / VERIFICATION)
    except FileNotFoundError:
        return None
    except ValueError:
        raise CogpressError(f"{folder / VERIFICATION} is no verification report. Verify the weights again.") from None
    checks = content.get("checks", []) if isinstance(content, dict) else None
    whole = isinstance(checks, list) and all(isinstance(check, dict) for check in checks)
    if not whole or not isinstance(content.get("files"), dict):
        raise CogpressError(f"{folder / VERIFICATION} is no verification report. Verify the weights again.")
    return content


def state(folder: Path, checked: dict[str, Any] | None = None) -> State:
    """Whether the weights in a folder are verified; every file that the report covers is hashed again.

    Args:
        folder: the weights.
        checked: their manifest, if the files were just compared with it; they are then not hashed again.

    Returns:
        `changed` for weights that are not those that were verified.
    """
    try:
        content = read_verification(folder)
    except CogpressError:
        content = None  # another program's file, or a truncated one
    if content is None:
        return "unverified"
    try:
        known = {name: file["sha256"] for name, file in (checked or {}).get("files", {}).items()}
        now = known or signed_files(folder)
    except (OSError, CogpressError):
        return "changed"
    if now != content["files"] or ((folder / NAME).is_file() and unlisted(folder, now)):
        return "changed"
    return "verified" if content.get("passed") is True else "failed"
