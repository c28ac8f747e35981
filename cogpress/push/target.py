"""What a push is asked to do, and each thing that it sends or runs, made in one place for the push and for --dry-run.

Knows names, bodies and hashes; runs and asks nothing, except that the hardware's plan may ask what an account has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cogpress.config import Case, Config
from cogpress.errors import CogpressError
from cogpress.files import read_json, sha256
from cogpress.plan import architecture, estimate
from cogpress.plan import report as plan_report
from cogpress.plan.hardware import table
from cogpress.preflight import ignore, place
from cogpress.push import journal
from cogpress.weights import manifest


@dataclass(frozen=True)
class Target:
    """A push, as a user asks for it.

    Attributes:
        root: the project's folder.
        destination: owner/name that people use.
        test_model: owner/name that is pushed to first.
        hardware: a SKU, or `auto` for what the plan says.
        visibility: of the destination, where it is made.
        allow_breaking: push although callers of the live version would notice.
        fresh: forget what earlier pushes did.
    """

    root: Path
    destination: str
    test_model: str
    hardware: str = "auto"
    visibility: Literal["private", "public"] = "private"
    allow_breaking: bool = False
    fresh: bool = False

    @classmethod
    def of(cls, root: Path, settings: Config, destination: str, test_model: str | None = None, **more: Any) -> Target:
        """A target with valid names; `more` are other attributes.

        Raises:
            CogpressError: a name is not owner/name, or both are the same.
        """
        test = test_model or settings.push.test_model or f"{destination}-test"
        for name in (destination, test):
            if not place.NAME.fullmatch(name):
                raise CogpressError(f"{name!r} is not owner/name. Copy it from the address of its page on Replicate.")
        if test.lower() == destination.lower():
            raise CogpressError(f"{destination} cannot be its own test model. Name another with --test-model.")
        return cls(root, destination, test, **more)

    @property
    def folder(self) -> Path:
        """Where the journal, the logs and the report are."""
        return self.root / "runs" / "push" / self.destination.replace("/", "--")


def hardware(target: Target, settings: Config, *, ask: bool = True) -> str:
    """The SKU to run on: the one that was named, or the cheapest that the plan finds fit.

    Args:
        target: what is pushed where.
        settings: of `model.yaml`.
        ask: Replicate what hardware the account has; else the dated table tells.

    Raises:
        CogpressError: the plan does not know the model, or nothing fits.
    """
    if target.hardware != "auto":
        return target.hardware
    own = target.root / "weights" / "config.json"
    try:
        if own.is_file():
            model = architecture.read(read_json(own), str(own))
        else:
            model = architecture.of(settings.serve.weights or settings.base.source, target.root / ".cache")
        if ask:
            made = plan_report.of_project(settings, target.root, model)
        else:
            path = target.root / settings.plan.hardware if settings.plan.hardware else None
            made = estimate.make(settings, model, table(path, settings.plan.prices))
    except (CogpressError, ValueError) as error:
        raise CogpressError(f"The plan can not choose hardware: {error} Or name one with --hardware SKU.") from None
    if made.hardware is None:
        raise CogpressError(
            "By the plan the model fits on none of the hardware; scripts/plan shows why. Name one with --hardware SKU."
        )
    return made.hardware.sku


def example(settings: Config) -> dict[str, Any] | None:
    """The input to show people: the first test's whose answer is one."""
    fine = (case for case in settings.push.tests if case.error is None and not case.cancels)
    found: Case | None = next(fine, None)
    return None if found is None else dict(found.input)


def fingerprint(root: Path, settings: Config) -> str:
    """One hash of everything that enters the image.

    Files that the weights' manifest lists count by the hash that it records, which preflight compares with the files;
    of model.yaml, everything counts but its section `push`.

    Raises:
        CogpressError: weights that are to be fetched at the start would enter the image.
    """
    try:
        patterns = ignore.Ignore((root / ignore.NAME).read_text(encoding="utf-8"))
    except OSError:
        raise CogpressError(f"There is no {root / ignore.NAME}. scripts/preflight --fix writes one.") from None
    entries = [entry for entry in ignore.context(root, patterns) if not entry.name.startswith(".cog/")]
    inside = [entry.name for entry in entries if entry.name.endswith(".safetensors")]
    if settings.push.weights == "fetched":
        if inside:
            raise CogpressError(
                f"push.weights is fetched, and {inside[0]} would enter the image. Remove the line !weights from "
                f"{ignore.NAME}."
            )
        if "://" not in (settings.serve.weights or ""):
            raise CogpressError("push.weights is fetched, and serve.weights names no address to fetch them from.")
    listed = (manifest.read(root / "weights") or {}).get("files") or {}
    files = {}
    for entry in entries:
        recorded = listed.get(entry.name.removeprefix("weights/")) if entry.name.startswith("weights/") else None
        if entry.name == "model.yaml":
            # How a version is tried is not what it does: other tests need no other image.
            files[entry.name] = journal.key(settings.model_dump(mode="json", exclude={"push"}))
            continue
        known = recorded is not None and recorded.get("bytes") == entry.size
        files[entry.name] = recorded["sha256"] if known and recorded else sha256(root / entry.name)
    return journal.key(files)
