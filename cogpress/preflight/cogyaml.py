"""Check cog.yaml against Cog's rules: options, deprecated names, versions, variables, commands.

The rules follow Cog's reference and public copies of its source.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some, warning
from cogpress.preflight.facts import Facts

TOPIC = "Configuration"

KEYS = {"build", "concurrency", "environment", "image", "predict", "run", "tests", "train", "weights"}
BUILD_KEYS = {
    *("cuda", "cudnn", "fast", "gpu", "pre_install", "python_overrides", "python_packages", "python_requirements"),
    *("python_version", "run", "sdk_version", "system_packages"),
}

PAST = {
    "predict": 'run: "predict.py:Runner"',
    "concurrency": "@cog.concurrent(max=N) above the runner's run()",
    "build.python_packages": "build.python_requirements, a file",
    "build.pre_install": "build.run",
}
"""Deprecated options and their replacements."""

EARLIER = ("tests", "build.fast", "build.python_overrides")
"""Options of some earlier releases."""

PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
CUDAS = (*(f"11.{minor}" for minor in range(9)), *(f"12.{minor}" for minor in range(10) if minor != 7))
CUDAS = (*CUDAS, "13.0", "13.1", "13.2")
"""CUDA versions that Cog has base images for."""

FORBIDDEN = re.compile(
    r"PATH|LD_LIBRARY_PATH|LIBRARY_PATH|PYTHONPATH|PYTHONUNBUFFERED|VIRTUAL_ENV|HF_ENDPOINT|"
    r"HF_HUB_ENABLE_HF_TRANSFER|(R8|REPLICATE|CUDA|NVIDIA|NV|PGET|KUBERNETES)_.*"
)
"""Variables that Cog sets itself."""

_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("cuda", "cudnn", "python_requirements", "python_overrides", "sdk_version"), (str,)),
    **dict.fromkeys(("gpu", "fast"), (bool,)),
    **dict.fromkeys(("run", "system_packages", "python_packages", "pre_install"), (list, type(None))),
}


def _options(facts: Facts) -> Iterator[Finding]:
    if facts.cog is None:
        yield failed(
            f"cog.yaml {facts.cog_problem}.", "Restore the repository's cog.yaml, or correct what is wrong in it."
        )
        return
    unknown = [("", str(name), KEYS) for name in facts.cog if name not in KEYS]
    unknown += [("build.", str(name), BUILD_KEYS) for name in facts.build if name not in BUILD_KEYS]
    for section, name, known in unknown:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.7)
        yield failed(
            f"{section}{name} is not an option of cog.yaml.",
            f"Write {near[0]}." if near else "Remove it: Cog refuses the file.",
        )
    if not isinstance(facts.cog.get("build", {}), dict):
        yield failed("build is not a section.", "Write its options under it, one per line.")
    wrong = [name for name, kinds in _TYPES.items() if not isinstance(facts.build.get(name, kinds[0]()), kinds)]
    for name in wrong:
        kinds = {str: "a text in quotes", bool: "true or false", list: "a list"}
        yield failed(f"build.{name} is {facts.build[name]!r}.", f"Write {kinds[_TYPES[name][0]]}.")
    if not unknown and not wrong:
        yield passed(f"{len(facts.cog)} options, all known to Cog")


def _past(facts: Facts) -> Iterator[Finding]:
    if "run" in (facts.cog or {}) and "predict" in (facts.cog or {}):
        yield failed("run and predict are both set.", "Remove predict, the older name.")
        return
    given = {*(facts.cog or {}), *(f"build.{name}" for name in facts.build)}
    for name, instead in PAST.items():
        if name in given:
            yield warning(f"{name} is deprecated.", f"Write {instead} instead.")
    for name in EARLIER:
        if name in given:
            yield warning(f"{name} belongs to earlier releases of Cog, and this one may refuse it.", "Remove it.")
    if not given & {*PAST, *EARLIER}:
        yield passed("no deprecated option")


def _python(facts: Facts) -> Iterator[Finding]:
    given = facts.build.get("python_version")
    text = str(given)
    if given is None:
        yield failed(
            "build.python_version is missing.", 'Write python_version: "3.12", the version that the lock is for.'
        )
    elif not isinstance(given, str):
        yield failed(
            f"build.python_version is the number {given}, and 3.10 would be read as 3.1.",
            f'Put it into quotes: python_version: "{given}".',
        )
    elif not re.fullmatch(r"\d+\.\d+(\.\d+)?", text):
        yield failed(f"build.python_version is {text!r}, not a version.", f"Write one of {', '.join(PYTHONS)}.")
    elif ".".join(text.split(".")[:2]) not in PYTHONS:
        yield failed(f"Cog has no images for Python {text}.", f"Write one of {', '.join(PYTHONS)}.")
    else:
        yield passed(f"Python {text}")


def _cuda(facts: Facts) -> Iterator[Finding]:
    given = facts.build.get("cuda")
    if facts.build.get("gpu") is not True:
        vllm = facts.settings is not None and facts.settings.serve.engine == "vllm"
        if vllm:
            yield failed("build.gpu is not true, and vLLM's image is for GPUs.", "Write gpu: true below build.")
        else:
            yield skipped("the image is for CPUs (build.gpu)")
        return
    if given is None:
        yield warning("build.cuda is missing: Cog guesses it from torch.", 'Write cuda: "13.0", as in the lock.')
    elif not isinstance(given, str) or not re.fullmatch(r"\d+\.\d+(\.\d+)?", given):
        yield failed(f"build.cuda is {given!r}, not a version in quotes.", 'Write cuda: "13.0".')
    elif ".".join(given.split(".")[:2]) not in CUDAS:
        yield failed(f"Cog has no base image with CUDA {given}.", f"Write one of {', '.join(CUDAS[-6:])}.")
    else:
        yield passed(f"CUDA {given}")


def _variables(facts: Facts) -> Iterator[Finding]:
    given = (facts.cog or {}).get("environment") or []
    if not isinstance(given, list):
        yield failed("environment is not a list.", "Write - NAME=value, one per line.")
        return
    every, seen = True, set[str]()
    for number, entry in enumerate(given, 1):
        name, equals, _ = str(entry).partition("=")
        good = False
        if not equals or not name:
            # Not shown: it may be a secret without its name.
            yield failed(f"Entry {number} of environment is not NAME=value.", "Write - NAME=value.")
        elif FORBIDDEN.fullmatch(name):
            yield failed(f"environment sets {name}, which Cog sets itself and refuses here.", "Remove that line.")
        elif name in seen:
            yield failed(f"environment sets {name} twice.", "Keep one of the two lines.")
        else:
            good = True
        every &= good
        seen.add(name)
    if every:
        yield passed(f"{len(seen)} variables" if seen else "none set")


def _commands(facts: Facts) -> Iterator[Finding]:
    listed = facts.build.get("run")
    given = listed if isinstance(listed, list) else []
    found = []
    for number, command in enumerate(given, 1):
        text = command.get("command") if isinstance(command, dict) else command
        where = f"Command {number} of build.run"
        if not isinstance(text, str):
            found.append(failed(f"{where} is not text.", "Write the command, or command: with mounts:."))
            continue
        if "\n" in text.strip():
            found.append(failed(f"{where} has several lines, which Cog refuses.", "Join them with &&."))
        if re.search(r";(?!;)", text):
            found.append(warning(f"{where} continues after a part fails (;).", "Join the parts with &&."))
        if re.search(r"\bcurl\b", text) and not re.search(r"--fail\b|\s-[a-zA-Z]*f", text):
            found.append(warning(f"{where} would take an error page for the file.", "Use curl --fail."))
        if re.search(r"/latest/|:latest\b", text):
            found.append(warning(f"{where} downloads whatever is latest.", "Name a version."))
    yield from found or [passed(f"{len(given)} commands" if given else "none")]


def _image(facts: Facts) -> Iterator[Finding]:
    image: Any = (facts.cog or {}).get("image")
    if image is None:
        yield passed("named when it is pushed")
    elif isinstance(image, str) and re.fullmatch(r"r8\.im/[a-z0-9][a-z0-9._-]*/[a-z0-9][a-z0-9._-]*", image):
        yield passed(image)
    else:
        yield failed(
            f"image is {str(image)!r}, not a place on Replicate.", "Write image: r8.im/owner/name, or remove it."
        )


def _model_yaml(facts: Facts) -> Iterator[Finding]:
    if facts.settings is None:
        yield failed(str(facts.settings_problem), "Correct model.yaml; predict.py reads it when it starts.")
    else:
        yield passed(f"model {facts.settings.name}, base {some([facts.settings.public()['base']['source']])}")


CHECKS = [
    Check(TOPIC, "options", _options),
    Check(TOPIC, "deprecated names", _past),
    Check(TOPIC, "Python", _python),
    Check(TOPIC, "CUDA", _cuda),
    Check(TOPIC, "environment", _variables),
    Check(TOPIC, "build commands", _commands),
    Check(TOPIC, "image", _image),
    Check(TOPIC, "model.yaml", _model_yaml),
]
