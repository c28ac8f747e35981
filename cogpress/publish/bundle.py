"""The files of a publication, checked, and the facts for its model card."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.files import read_json, sha256
from cogpress.publish import card
from cogpress.publish.licence import CardData, find_origin, named_licence, public_name
from cogpress.redact import PATTERNS
from cogpress.train import run as training
from cogpress.weights import manifest
from cogpress.weights.filenames import HUB_FILES, VERIFICATION_FILES, refuse_pickle

CARD = "README.md"
_TEXT_BYTES = 32 << 20
"""Files up to this size are searched for secrets; larger ones are weights."""


@dataclass(frozen=True)
class Publication:
    """What to publish, and how.

    Attributes:
        repo: organisation/name.
        folder: the weights.
        runs: the folder of all runs; the one that made the weights is found by its adapter.
        run: that run's folder, if the user names it.
        licence: the Hub's identifier, if it is not the base's.
        public: visible to everybody.
        branch: of the repository.
        allow_unverified: publish weights without a passed verification.
        examples: number of validation answers that the card shows.
    """

    repo: str
    folder: Path
    runs: Path
    run: Path | None = None
    licence: str | None = None
    public: bool = False
    branch: str = "main"
    allow_unverified: bool = False
    examples: int = 0


@dataclass(frozen=True)
class BundleFile:
    """One file to publish; `content` is its path or its bytes."""

    name: str
    size: int
    sha256: str
    content: Path | bytes

    def read(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content.read_bytes()


@dataclass(frozen=True)
class Bundle:
    """Everything that is uploaded, checked."""

    files: list[BundleFile]
    card: str
    notes: list[str]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of finished weights, which lists only files of a model under safe names; none is read yet.

    Raises:
        CogpressError: there is none, it is not of weights, or it lists what does not belong on the Hub.
    """
    facts = manifest.read(folder)
    if facts is None or facts.get("kind") != "weights":
        raise CogpressError(
            f"{folder} holds no weights made by cogpress: its {manifest.NAME} is "
            f"{'missing' if facts is None else 'of something else'}. Name the folder with --weights, or make one with "
            "scripts/train --install."
        )
    for name in facts.get("files") or {}:
        path = PurePosixPath(name)
        refuse_pickle(path, folder)
        # The patterns that fetching uses: a file that they leave out would be missing after a download.
        known = any(fnmatch(name, pattern) for pattern in (*HUB_FILES, "*.safetensors"))
        if path.is_absolute() or ".." in path.parts or path.name.startswith(".") or "\\" in name or not known:
            raise CogpressError(
                f"{folder / manifest.NAME} lists {name!r}, which is no part of a model. Nothing was uploaded; merge "
                "the weights again."
            )
    return facts


def why_unverified(report: dict[str, Any] | None, facts: dict[str, Any]) -> str | None:
    """Why these weights do not count as verified; None if they do.

    Args:
        report: the verification report, if there is one.
        facts: the weights' manifest.
    """
    if report is None:
        return "there is no verification report"
    if report.get("files") != {name: file["sha256"] for name, file in facts["files"].items()}:
        return "the verification report is about other files"
    failed = [str(check.get("name")) for check in report.get("checks") or [] if check.get("passed") is not True]
    if failed or report.get("passed") is not True:
        return f"verification failed{': ' if failed else ''}{', '.join(failed)}"
    return None


def unverified(request: Publication, facts: dict[str, Any]) -> str | None:
    """Why the weights to publish are not verified; None if they are.

    Raises:
        CogpressError: they are not, and the user did not allow that.
    """
    reason = why_unverified(manifest.read_verification(request.folder), facts)
    if reason and not request.allow_unverified:
        raise CogpressError(
            f"{request.folder} is not verified: {reason}. Run scripts/verify, or give --allow-unverified; the model "
            "card then says so."
        )
    return reason


def prepare(request: Publication, facts: dict[str, Any], unverified: str | None, card_data: CardData) -> Bundle:
    """Check every file against the manifest and write the card.

    Args:
        request: what to publish.
        facts: the weights' manifest.
        unverified: why they are not verified.
        card_data: reads the card of a base from the Hub.

    Raises:
        CogpressError: a file differs from the manifest or holds a secret, the named run made other weights, or the
            licence is unknown.
    """
    notes = [f"Not verified: {unverified}. The card says so."] if unverified else []
    # The quick checks first, then the sha256 of gigabytes.
    text = card.write(card_facts(request, facts, unverified, card_data, notes))
    manifest.check(request.folder, facts)
    files = [
        BundleFile(name, recorded["bytes"], recorded["sha256"], request.folder / name)
        for name, recorded in facts["files"].items()
    ]
    # A report about other files would mislead.
    if unverified is None or unverified.startswith("verification failed"):
        reports = [
            name for name in VERIFICATION_FILES if name not in facts["files"] and _is_plain(request.folder / name)
        ]
        files += [_file(name, request.folder / name) for name in reports]
    files += [_public_manifest(request.folder, facts, notes), _file(CARD, text.encode())]
    for file in files:
        _refuse_secrets(file)
    return Bundle(files, text, notes)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _file(name: str, content: Path | bytes) -> BundleFile:
    if isinstance(content, Path):
        return BundleFile(name, content.stat().st_size, sha256(content), content)
    return BundleFile(name, len(content), hashlib.sha256(content).hexdigest(), content)


def _public_manifest(folder: Path, facts: dict[str, Any], notes: list[str]) -> BundleFile:
    """The manifest, with the base's source reduced to its public name."""
    source = str((facts.get("base") or {}).get("source", ""))
    if not source or public_name(source) == source:
        return _file(manifest.NAME, folder / manifest.NAME)
    shown = public_name(source)
    notes.append(f"The published manifest names the base's source only as {shown}.")
    public = {**facts, "base": {**facts["base"], "source": shown}}
    return _file(manifest.NAME, (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode())


def _refuse_secrets(file: BundleFile) -> None:
    from huggingface_hub import get_token

    if file.size > _TEXT_BYTES or file.name.endswith(".safetensors"):
        return
    content = file.read().decode(errors="replace")
    token = get_token()
    found = ["your own token"] if token and token in content else []
    found += [kind for kind, pattern in PATTERNS.items() if pattern.search(content)]
    if found:
        raise CogpressError(
            f"{file.name} holds {found[0]}. Nothing was uploaded; remove it at its source (model.yaml's prompt, the "
            "base's files) and make the weights again."
        )


def card_facts(
    request: Publication, facts: dict[str, Any], unverified: str | None, card_data: CardData, notes: list[str]
) -> card.CardFacts:
    """The facts of the weights' card; see `prepare`. Adds to `notes` what is missing.

    Raises:
        CogpressError: the licence is unknown, or the run that the user named made other weights.
    """
    run = find_run(request, facts)
    if run is None:
        notes.append("The run that made these weights was not found: the card lacks its figures. Name it with --run.")
    source = str((facts.get("base") or {}).get("source", ""))
    given = named_licence(request.licence) if request.licence else None
    try:
        found = find_origin(source, card_data)
    except CogpressError as error:
        if given is None:
            raise CogpressError(f"{error} Or give the licence with --license.") from None
        found = find_origin(source, lambda _repo, _revision: {})
    licence = given or found.licence
    if licence is None:
        raise CogpressError(
            f"The licence of the base model {found.shown} is unknown, and it covers these weights too. Give it with "
            "--license, such as --license apache-2.0."
        )
    saved = _run_facts(run, facts) if run else {}
    answers = saved.pop("answers", [])
    if not 0 <= request.examples <= len(answers):
        raise CogpressError(
            f"--examples {request.examples}: the run kept {len(answers)} answers. Ask for at most as many."
        )
    prompt = facts.get("prompt")
    return card.CardFacts(
        repo=request.repo,
        branch=request.branch,
        origin=found,
        licence=licence,
        prompt=config.Prompt.model_validate(prompt) if prompt else config.Prompt(),
        has_chat_template=_has_chat_template(request.folder),
        manifest=facts,
        verification=manifest.read_verification(request.folder) if unverified is None else None,
        unverified=unverified,
        answers=answers[: request.examples],
        **saved,
    )


def _has_chat_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").is_file() or bool(
        _json(folder / "tokenizer_config.json", {}).get("chat_template")
    )


def find_run(request: Publication, facts: dict[str, Any]) -> Path | None:
    """The folder of the run whose adapter is in these weights; None if it is not here.

    Raises:
        CogpressError: the run that the user named made other weights.
    """
    if request.run is None:
        return training.run_of(facts, request.runs)
    if not training.is_run_of(request.run, facts):
        raise CogpressError(
            f"{request.run} is not the run that made {request.folder}: its adapter is another, or missing. Name the "
            "right one, or omit --run to have it found."
        )
    return request.run


def _run_facts(run: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """The run's figures on these weights; figures measured on other weights are left out."""
    weights = manifest.recorded_fingerprint(facts)
    compared = _json(run / "divergence.json", {})
    served = _json(run / "served-tuned.json", {})
    exact = _json(run / "report.json", {}).get("exact_match") or {}
    return {
        "config": config.parse(_json(run / "config.json", {}), str(run / "config.json")),
        "result": _json(run / "result.json", {}).get("result") or {},
        "data": _json(run / "data.json", {}),
        "divergence": compared if compared.get("key", {}).get("weights") == weights else {},
        "exact_match": exact if served.get("key", {}).get("weights") == weights else {},
        "answers": _json(run / "answers.json", []),
    }


def _json(path: Path, default: Any) -> Any:
    try:
        return read_json(path)
    except FileNotFoundError:
        return default
    except ValueError:
        raise CogpressError(f"{path} is not JSON. Remove it, or make it again with scripts/train.") from None
