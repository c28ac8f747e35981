"""Check what enters the image: what is excluded, what is needed, its size, secrets and private data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from rich.filesize import decimal as size

from cogpress.files import is_file
from cogpress.preflight import secrets
from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some, warning
from cogpress.preflight.facts import Facts
from cogpress.preflight.ignore import NAME, Entry

TOPIC = "Image"

NEVER = {
    "**/.env": ("x.d/.env", ".env"),
    "**/.env.*": ("x.d/.env.local", ".env.local"),
    "**/*.env": ("x.d/prod.env", "prod.env"),
    "**/*.pem": ("x.d/server.pem", "server.pem"),
    "**/*.key": ("x.d/id.key", "id.key"),
    "**/.netrc": ("x.d/.netrc", ".netrc"),
    "**/.git": (".git/config", "x.d/.git/config"),
    "**/.cache": (".cache/base/model.safetensors",),
    ".venv*": (".venv/bin/python", ".venv-quantize/bin/python"),
    "runs": ("runs/demo/weights/model.safetensors",),
    "data": ("data/train.jsonl",),
    "**/__pycache__": ("cogpress/__pycache__/base.pyc",),
    "**/*.py[cod]": ("cogpress/base.pyc",),
}
"""Patterns that `.dockerignore` must exclude from every image, and paths that test whether it does."""

LARGE_OTHER = 200_000_000
"""Bytes beside the weights above which the image probably holds something superfluous."""

LARGE_WEIGHTS = 10_000_000_000
"""Bytes of weights above which it is better to download them at the start than to push them."""

TEXT_BYTES = 8 << 20
"""Files above this size are not text that a person wrote."""

_BINARY = {".safetensors", ".png", ".jpg", ".jpeg", ".gif", ".woff2", ".tar", ".gz", ".zip", ".so", ".parquet"}


def missing(facts: Facts) -> list[str]:
    """Patterns that `.dockerignore` lacks."""
    if facts.ignore is None:
        return list(NEVER)
    return [line for line, samples in NEVER.items() if not all(map(facts.ignore.ignores, samples))]


def _left_out(facts: Facts) -> Iterator[Finding]:
    lines = missing(facts)
    if facts.ignore is None:
        yield failed(
            f"There is no {NAME}: everything in the folder would enter the image.", "--fix writes one.", safe=True
        )
    elif lines:
        yield warning(f"{NAME} does not leave out {some(lines, 6)}.", "--fix adds these lines.", safe=True)
    else:
        yield passed(f"{NAME} leaves out secrets, environments, caches and runs")


def _needed(facts: Facts) -> list[str]:
    cog = facts.cog or {}
    named = [str(cog.get(key)).partition(":")[0] for key in ("run", "predict", "train") if cog.get(key)]
    requirements = facts.build.get("python_requirements")
    needed = [facts.file, "model.yaml", *named, *([requirements] if isinstance(requirements, str) else [])]
    package = facts.root / "cogpress"
    needed += [path.relative_to(facts.root).as_posix() for path in package.rglob("*.py")] if package.is_dir() else []
    listed = (facts.weights.manifest or {}).get("files") or {}
    fetched = facts.settings is not None and facts.settings.push.weights == "fetched"
    needed += [f"weights/{name}" for name in listed] if facts.weights.bytes and not fetched else []
    return [*needed, *(_score(facts) if cog.get("train") else []), ".cog/openapi_schema.json"]


def _score(facts: Facts) -> list[str]:
    """The project's files that hold `verify.score`, which a training imports."""
    module, colon, _ = (facts.settings.verify.score if facts.settings else "").partition(":")
    if not colon:
        return []
    path = PurePosixPath(*module.split("."))
    files = [path.with_suffix(".py"), *(folder / "__init__.py" for folder in (path, *path.parents))]
    return [str(file) for file in files if is_file(facts.root / file)]


def _let_in(facts: Facts) -> Iterator[Finding]:
    if facts.ignore is None:
        yield skipped(f"there is no {NAME}")
        return
    kept_out = [name for name in _needed(facts) if facts.ignore.ignores(name)]
    if kept_out:
        tops = list(dict.fromkeys(name.split("/")[0] for name in kept_out))
        yield failed(
            f"{NAME} keeps {some(kept_out)} out of the image, which needs it.",
            f"Add the line{'s' if len(tops) > 1 else ''} {some('!' + top for top in tops)}.",
        )
    else:
        yield passed(f"{NAME} lets in all {len(_needed(facts))} files that serving needs")


def _links(facts: Facts) -> Iterator[Finding]:
    """Docker sends a link as a link, so its target must be sent too."""
    links = [entry.name for entry in facts.entries if entry.link]
    root = facts.root.resolve()
    lost = []
    for name in links:
        target = (root / name).resolve()
        inside = target.is_relative_to(root) and target.exists()
        if not inside or (facts.ignore and facts.ignore.ignores(target.relative_to(root).as_posix())):
            lost.append(name)
    if lost:
        yield failed(
            f"{some(lost)} links to what does not enter the image, where the link would dangle.",
            f"Replace it with the files: cp -rL {lost[0]} ELSEWHERE, then move that into place.",
        )
    else:
        yield passed(f"{len(links)} links, to what enters the image too" if links else "none")


def _size(facts: Facts) -> Iterator[Finding]:
    inside = [entry for entry in facts.entries if entry.name.startswith("weights/")]
    others = [entry for entry in facts.entries if not entry.name.startswith("weights/")]
    weights, rest = _sum(inside), _sum(others)
    told = f"{size(weights)} of weights and {size(rest)} in {len(others)} other files"
    largest = sorted(others, key=lambda entry: -entry.size)[:3]
    if rest > LARGE_OTHER:
        shown = some(f"{entry.name} ({size(entry.size)})" for entry in largest)
        yield warning(f"The image gets {told}, the largest {shown}.", f"Exclude in {NAME} what serving does not need.")
    elif weights > LARGE_WEIGHTS:
        yield warning(
            f"The image gets {told}. Above {size(LARGE_WEIGHTS)} of weights pushes and cold starts are long; "
            "fetched at the start, pget gets them in parallel pieces.",
            f"Host them where https reaches them, name serve.weights, set push.weights to fetched and remove !weights "
            f"from {NAME}. (Cog's managed weights do not go with the two models of scripts/push.)",
        )
    elif weights:
        yield passed(f"{told}; up to {size(LARGE_WEIGHTS)} are best in the image: no start depends on a download")
    else:
        yield passed(f"{told}; the weights are fetched at the start")


def _sum(entries: list[Entry]) -> int:
    return sum(entry.size for entry in entries)


def _secrets(facts: Facts) -> Iterator[Finding]:
    found = []
    read = 0
    for entry in facts.entries:
        if kind := secrets.by_name(entry.name):
            found.append(
                failed(f"{entry.name}, {kind}, would enter the image.", f"Exclude it in {NAME}; --fix does.", safe=True)
            )
            continue
        if entry.size > TEXT_BYTES or any(entry.name.endswith(suffix) for suffix in _BINARY) or _vocabulary(entry):
            continue
        text = facts.text(entry.name)
        if text is None:
            continue
        read += 1
        for find in secrets.in_text(text):
            found.append(
                failed(
                    f"{entry.name}, line {find.line}, holds {find.kind}, which would enter the image.",
                    "Remove it and revoke it: whoever had this file has it. Pass secrets in environment variables.",
                )
            )
    yield from found[:20]
    if len(found) > 20:
        yield failed(f"{len(found) - 20} more files or lines hold secrets.", "Correct these first.")
    if not found:
        yield passed(f"none in {read} text files, by form, by entropy, by name")


def _vocabulary(entry: Entry) -> bool:
    return entry.name.startswith("weights/") and entry.name.rpartition("/")[2] in ("tokenizer.json", "vocab.json")


def data_files(facts: Facts) -> list[str]:
    """Files that may be people's data and are not let in by name."""
    found = [entry.name for entry in facts.entries if secrets.is_data(entry.name)]
    return [name for name in found if not (facts.ignore and facts.ignore.names(name))]


def _private(facts: Facts) -> Iterator[Finding]:
    data = data_files(facts)
    meant = [entry.name for entry in facts.entries if secrets.is_data(entry.name) and entry.name not in data]
    if meant:
        yield warning(
            f"{some(meant)} enters the image, let in by name: everyone with the image has it.",
            f"Nothing, if it is public; otherwise remove the line from {NAME}.",
        )
    if data:
        yield failed(
            f"{some(data)} would enter the image: examples can be private, and everyone with the image has them.",
            f"Exclude it in {NAME}; --fix does. If serving needs it and it is public, let it in with !{data[0]}.",
            safe=True,
        )
    people = []
    for entry in facts.entries:
        if entry.size <= TEXT_BYTES and not _vocabulary(entry) and not secrets.is_data(entry.name):
            text = facts.text(entry.name)
            if text is not None and secrets.addresses(text) >= secrets.MANY_ADDRESSES:
                people.append(entry.name)
    if people:
        yield warning(f"{some(people)} hold many e-mail addresses.", f"Check them; exclude them in {NAME}.")
    if not data and not people and not meant:
        yield passed("no data files, no lists of addresses")


def _git(facts: Facts) -> Iterator[Finding]:
    git = facts.machine.git
    if git is None:
        yield skipped("the folder is not a git repository, so nothing records what was pushed", "git init")
        return
    inside = {entry.name for entry in facts.entries}
    tracked = sorted(name for name in git.tracked if secrets.by_name(name))
    if tracked:
        yield failed(
            f"{some(tracked)} is tracked by git and may hold secrets.",
            f"git rm --cached {tracked[0]}, add it to .gitignore, and revoke the secrets.",
        )
    changed = [name for name in (*git.changed, *git.untracked) if name in inside]
    if changed:
        yield warning(
            f"{some(changed)} differ from commit {git.commit or '(none)'}, so no commit records what is pushed.",
            "git commit",
        )
    elif not tracked:
        yield passed(
            f"what enters the image is commit {git.commit}" + (", weights aside" if facts.weights.bytes else "")
        )


CHECKS = [
    Check(TOPIC, "left out", _left_out),
    Check(TOPIC, "let in", _let_in),
    Check(TOPIC, "links", _links),
    Check(TOPIC, "size", _size),
    Check(TOPIC, "secrets", _secrets),
    Check(TOPIC, "private data", _private),
    Check(TOPIC, "git", _git),
]
