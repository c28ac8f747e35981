"""The folder that `cog push` builds in: what `.dockerignore` lets into the image, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cogpress.cog.process import CPU_IMAGE, GPU_IMAGE, read_cog_yaml
from cogpress.errors import CogpressError
from cogpress.files import link
from cogpress.preflight import ignore

CODE = (".py", ".ipynb")
"""Cog makes no separate layer of a folder with such a file anywhere below it, and does not say so."""


@contextmanager
def build_context(root: Path, folder: Path, file: str = GPU_IMAGE) -> Iterator[Path]:
    """A fresh folder with hard links to the image's files, copies where the disk has none; removed at the end.

    With `--separate-weights` Cog walks the whole folder without asking `.dockerignore`, so big files in `runs/` or
    `.cache/` would become layers that its build cannot copy. It also keeps a list of the weights in `.cog/` that does
    not name the image, so a push of unchanged weights under another name would ask for a layer that was never pushed.

    Args:
        root: the project's folder.
        folder: where to make it, on the same disk if possible.
        file: what describes the image, which is cog.yaml there.
    """
    place = folder / "context"
    shutil.rmtree(place, ignore_errors=True)
    link(root / file, place / GPU_IMAGE)
    for name in sorted({*_needed(root, file), *(entry.name for entry in entries(root))} - {GPU_IMAGE, CPU_IMAGE}):
        source, target = root / name, place / name
        if source.is_symlink():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(os.readlink(source))
        else:
            link(source, target)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def code_beside_weights(root: Path) -> list[str]:
    """The files below `weights/` that keep the weights out of a layer of their own."""
    names = (entry.name for entry in entries(root))
    return [name for name in names if name.startswith("weights/") and name.endswith(CODE)]


def entries(root: Path) -> list[ignore.Entry]:
    """The project's files that enter an image; Cog makes those in `.cog/` itself.

    Raises:
        CogpressError: there is no `.dockerignore`.
    """
    try:
        patterns = ignore.Ignore((root / ignore.NAME).read_text(encoding="utf-8"))
    except OSError:
        raise CogpressError(f"{root / ignore.NAME} is missing. Write it with scripts/preflight --fix.") from None
    return [entry for entry in ignore.context(root, patterns) if not entry.name.startswith(".cog/")]


def _needed(root: Path, file: str) -> list[str]:
    """What Cog and Docker read in the folder, also where `.dockerignore` keeps it out of the image."""
    requirements = (read_cog_yaml(root, file).get("build") or {}).get("python_requirements")
    return [name for name in (ignore.NAME, requirements) if name and (root / name).is_file()]
