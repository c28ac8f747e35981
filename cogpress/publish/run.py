"""Publish verified weights on the Hugging Face Hub: in one commit, private by default, compared after the upload."""

from __future__ import annotations

import hashlib
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

import cogpress
from cogpress.cli import step
from cogpress.errors import CogpressError
from cogpress.publish import bundle
from cogpress.publish.bundle import Bundle, BundleFile, Publication
from cogpress.publish.hub import AGAIN, Hub
from cogpress.weights import manifest
from cogpress.weights.filenames import VERIFICATION_FILES, is_loaded

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling


@dataclass(frozen=True)
class Published:
    """A finished publication; `sent` names the uploaded files, `removed` those of an earlier version."""

    url: str
    source: str
    revision: str
    sent: list[str]
    removed: list[str]
    seconds: float


def publish(request: Publication, console: Console, *, endpoint: str | None = None) -> Published:
    """Check everything, upload in one commit, and compare the repository with the manifest.

    Args:
        request: what to publish and where.
        console: where progress is shown.
        endpoint: the Hub's address, where it is not the library's default.

    Raises:
        CogpressError: the weights may not be published, or the Hub refuses or cannot be reached. The branch is then
            unchanged, and the next try does not send again what has arrived.
    """
    check_names(request.repo, request.branch)
    facts = bundle.read_manifest(request.folder)
    unverified = bundle.unverified(request, facts)
    hub = Hub(console, endpoint)
    with step("Hub", console) as say:
        name = hub.account()
        there = hub.info(request.repo)
        _check_repository(request, there)
        say(f"{name} at {hub.endpoint}; {request.repo} {'exists' if there else 'is new'}")
    files = _prepare(request, facts, unverified, hub, console)
    hub.check_card(request.repo, files.card)
    if there is None:
        hub.create(request.repo, private=not request.public)
        # An organisation's rules may make it public all the same.
        _check_repository(request, hub.info(request.repo))
    if request.branch != "main":
        hub.branch(request.repo, request.branch)
    with step("Upload", console) as say:
        published = _upload(request, files, hub)
        removed = f"; removed {', '.join(published.removed)} of an earlier version" if published.removed else ""
        say(f"{len(published.sent)} of {len(files.files)} files were new{removed}")
    console.print(_table(files, published))
    return published


def rehearse(request: Publication, console: Console, *, endpoint: str | None = None) -> Bundle:
    """Check the weights and print the files and the card that `publish` would upload, without uploading.

    The Hub is asked only for the licence of a base that comes from it.

    Raises:
        CogpressError: the weights may not be published.
    """
    check_names(request.repo, request.branch)
    facts = bundle.read_manifest(request.folder)
    unverified = bundle.unverified(request, facts)
    files = _prepare(request, facts, unverified, Hub(console, endpoint, anonymous=True), console)
    console.print(_table(files))
    console.print(Text(f"{bundle.CARD}:", style="bold"))
    console.print(Text(files.card), soft_wrap=True)
    where = f"{request.repo}, branch {request.branch}, {'public' if request.public else 'private'}"
    console.print(Text(f"Nothing was uploaded. Without --dry-run this goes to {where}.", style="bold"), soft_wrap=True)
    return files


def _prepare(request: Publication, facts: dict[str, Any], unverified: str | None, hub: Hub, console: Console) -> Bundle:
    with step("Weights", console) as say:
        files = bundle.prepare(request, facts, unverified, hub.card_data)
        say("all files match the manifest")
    for note in files.notes:
        console.print(Text(f"  {note}", style="yellow"), soft_wrap=True)
    return files


def check_names(repo: str, branch: str) -> None:
    """Refuse names that the Hub would refuse.

    Raises:
        CogpressError: with an example.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
        good = repo.count("/") == 1
    except HFValidationError:
        good = False
    if not good:
        raise CogpressError(
            f"{repo!r} is not a repository name. Write organisation/name with letters, digits, -, _ and . (at most "
            "96), such as my-team/queries-135m."
        )
    strange = r"\.\.|//|/$|\.$|\.lock$|^refs/|^[0-9a-f]{40}$"
    if not re.fullmatch(r"[A-Za-z0-9][\w./-]{0,100}", branch, re.ASCII) or re.search(strange, branch):
        raise CogpressError(f"{branch!r} is not a branch name. Write one such as main or v2.")


def _check_repository(request: Publication, there: ModelInfo | None) -> None:
    """Refuse a repository whose visibility is not the one asked for."""
    if there is None:
        return
    if not request.public and there.private is not True:
        raise CogpressError(
            f"{request.repo} is public on the Hub, and weights are private unless --public is given. Nothing was "
            "uploaded; give --public, make the repository private, or choose another name."
        )
    if request.public and there.private is True:
        raise CogpressError(
            f"{request.repo} is private on the Hub, and --public does not change that. Make it public in its settings, "
            "or omit --public."
        )


def _earlier(request: Publication, hub: Hub, there: ModelInfo) -> list[str]:
    """Files of an earlier publication on the branch.

    Raises:
        CogpressError: the branch holds another model, or files that would be loaded with this one.
    """
    names = [sibling.rfilename for sibling in there.siblings or []]
    listed = hub.read_json(request.repo, manifest.NAME, str(there.sha)).get("files") if manifest.NAME in names else {}
    ours = {*(listed if isinstance(listed, dict) else {}), *VERIFICATION_FILES}
    strange = [name for name in names if is_loaded(name) and name not in ours]
    if strange:
        raise CogpressError(
            f"{request.repo} holds {strange[0]}, which cogpress did not publish and which would be loaded with the "
            "model. Nothing was uploaded; choose another name, or delete the file there."
        )
    return [name for name in names if name in ours]


def _upload(request: Publication, files: Bundle, hub: Hub) -> Published:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    started = time.perf_counter()
    there = hub.info(request.repo, request.branch)
    if there is None:
        raise CogpressError(f"{request.repo} vanished from the Hub. {AGAIN}")
    siblings = {sibling.rfilename: sibling for sibling in there.siblings or []}
    new = [file for file in files.files if not _same(file, siblings.get(file.name))]
    names = {file.name for file in files.files}
    # A shard or chat template of an earlier version would be loaded with this one.
    stale = [name for name in _earlier(request, hub, there) if name not in names]
    revision = str(there.sha)
    if new or stale:
        additions = [
            CommitOperationAdd(file.name, file.content if isinstance(file.content, bytes) else str(file.content))
            for file in new
        ]
        hub.send(request.repo, request.branch, additions)
        revision = hub.commit(
            request.repo,
            request.branch,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            f"Publish {request.repo.partition('/')[2]} with cogpress {cogpress.__version__}",
            there.sha,
            landed=lambda: _landed(files, hub.info(request.repo, request.branch)),
        )
    _check_arrived(files, request.repo, hub.info(request.repo, revision))
    return Published(
        f"{hub.endpoint}/{request.repo}",
        f"hf://{request.repo}@{revision}",
        revision,
        [file.name for file in new],
        stale,
        time.perf_counter() - started,
    )


def _same(file: BundleFile, sibling: RepoSibling | None) -> bool:
    """Whether the Hub holds this very file: by sha256 for a large file, else by git's sha1."""
    if sibling is None or sibling.size != file.size:
        return False
    if sibling.lfs is not None:
        return sibling.lfs.sha256 == file.sha256
    content = file.read()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return sibling.blob_id == blob and hashlib.sha256(content).hexdigest() == file.sha256


def _wrong(files: Bundle, there: ModelInfo | None) -> list[str]:
    """Files that the Hub lacks, holds with other content, or should not hold."""
    siblings = {sibling.rfilename: sibling for sibling in (there.siblings if there else None) or []}
    names = {file.name for file in files.files}
    return [file.name for file in files.files if not _same(file, siblings.get(file.name))] + [
        name for name in siblings if is_loaded(name) and name not in names
    ]


def _landed(files: Bundle, there: ModelInfo | None) -> str | None:
    return None if there is None or _wrong(files, there) else there.sha


def _check_arrived(files: Bundle, repo: str, there: ModelInfo | None) -> None:
    if wrong := _wrong(files, there):
        raise CogpressError(
            f"{repo} does not hold what was sent: {', '.join(wrong)} differs from the manifest. Do not use this "
            f"revision. {AGAIN}"
        )


def _table(files: Bundle, published: Published | None = None) -> Table:
    total = sum(file.size for file in files.files)
    table = Table(title="Files", title_justify="left", show_footer=True)
    caption = f"{len(files.files)} files"
    table.add_column("file", caption, overflow="fold")
    table.add_column("size", decimal(total), justify="right", no_wrap=True)
    table.add_column("sha256", no_wrap=True)
    if published is not None:
        sent = sum(file.size for file in files.files if file.name in published.sent)
        speed = f"{sent / 1e6 / published.seconds:,.1f} MB/s, {published.seconds:.1f} s" if sent else "nothing new"
        table.add_column("on the Hub", speed, no_wrap=True)
    for file in files.files:
        state = [] if published is None else ["sent, checked" if file.name in published.sent else "was there, checked"]
        table.add_row(Text(file.name), decimal(file.size), file.sha256[:12], *state)
    return table
