"""What is pushed where: names, hardware, example input, and a fingerprint of the image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cogpress.cog.process import CPU_IMAGE, GPU_IMAGE
from cogpress.config import Case, Config
from cogpress.errors import CogpressError
from cogpress.files import sha256
from cogpress.plan import report as plan
from cogpress.preflight import ignore, place
from cogpress.push import journal
from cogpress.push.context import entries
from cogpress.weights import manifest

CPU = "cpu"
"""The SKU of Replicate's hardware without a GPU that can hold a small model; `cpu-small` has 2 GB."""


@dataclass(frozen=True)
class PushTarget:
    """A push, as the user asks for it.

    Attributes:
        root: the project's folder.
        destination: owner/name of the model that people use.
        test_model: owner/name of the model that is pushed to first.
        hardware: a SKU, or `auto` for the plan's choice.
        visibility: of the destination, where it is created.
        allow_breaking: push in spite of breaking changes.
        fresh: repeat the steps of earlier pushes.
        page: write the text of the destination's page, in place of what is there.
        clean: delete the test model's other versions at the end.
        cpu: build the image that needs no GPU, and create models on hardware without one.
    """

    root: Path
    destination: str
    test_model: str
    hardware: str = "auto"
    visibility: Literal["private", "public"] = "private"
    allow_breaking: bool = False
    fresh: bool = False
    page: bool = False
    clean: bool = False
    cpu: bool = False

    @classmethod
    def of(
        cls, root: Path, settings: Config, destination: str, test_model: str | None = None, **more: Any
    ) -> PushTarget:
        """A target with valid names; `more` are other attributes.

        Raises:
            CogpressError: a name is not owner/name, or both are the same.
        """
        test = test_model or settings.push.test_model or f"{destination}-test"
        for name in (destination, test):
            if not place.NAME.fullmatch(name):
                raise CogpressError(f"{name!r} is not owner/name. Copy it from the address of its page on Replicate.")
        target = cls(root, destination, test, **more)
        if destination.lower() in (test.lower(), target.trained_model.lower()):
            raise CogpressError(f"{destination} cannot be its own test model. Name another with --test-model.")
        return target

    @property
    def trained_model(self) -> str:
        """The model that gets what a test training makes: no untested version becomes another model's newest."""
        return f"{self.test_model}-trained"

    def sku(self, settings: Config, *, ask: bool = True) -> str:
        """The hardware to run on: the named one, for CPUs `cpu`, or the plan's choice; see `plan.report.sku`."""
        if self.hardware != "auto":
            return self.hardware
        return CPU if self.cpu else plan.sku(settings, self.root, ask=ask)

    @property
    def file(self) -> str:
        """The name of the file that describes the image."""
        return CPU_IMAGE if self.cpu else GPU_IMAGE

    @property
    def folder(self) -> Path:
        """Of the journal, the logs and the report."""
        return self.root / "runs" / "push" / self.destination.replace("/", "--")


def example(settings: Config) -> dict[str, Any] | None:
    """The input to show people: the first test's that has an answer."""
    fine = (case for case in settings.push.tests if case.error is None and not case.cancels)
    found: Case | None = next(fine, None)
    return None if found is None else dict(found.input)


def fingerprint(root: Path, settings: Config, file: str = GPU_IMAGE) -> str:
    """One hash of everything that enters the image which `file` describes.

    Weights count by their hash in the manifest, which preflight compares with the files; of model.yaml, all counts but
    `push`.

    Raises:
        CogpressError: there is no `.dockerignore`, or weights that are fetched at the start would enter the image.
    """
    found = entries(root)
    inside = [entry.name for entry in found if entry.name.endswith(".safetensors")]
    if settings.push.weights == "fetched":
        if inside:
            raise CogpressError(
                f"push.weights is fetched, but {inside[0]} would enter the image. Remove the line !weights from "
                f"{ignore.NAME}."
            )
        if "://" not in (settings.serve.weights or ""):
            raise CogpressError("push.weights is fetched, but serve.weights names no URL. Name one in model.yaml.")
    listed = (manifest.read(root / "weights") or {}).get("files") or {}
    files = {}
    for entry in found:
        if entry.name in (GPU_IMAGE, CPU_IMAGE):
            continue
        recorded = listed.get(entry.name.removeprefix("weights/")) if entry.name.startswith("weights/") else None
        if entry.name == "model.yaml":
            # Other tests need no other image.
            files[entry.name] = journal.key(settings.model_dump(mode="json", exclude={"push"}))
            continue
        known = recorded is not None and recorded.get("bytes") == entry.size
        files[entry.name] = recorded["sha256"] if known and recorded else sha256(root / entry.name)
    files[GPU_IMAGE] = sha256(root / file)
    return journal.key(files)
