"""Run `cog`: its verdict on a project, `cog login` and `cog push`.

Cog's token goes to the program's standard input alone, the API's nowhere.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cogpress.cog.process import GPU_IMAGE
from cogpress.config import Push
from cogpress.errors import CogpressError, reason
from cogpress.redact import redacted

REGISTRY = "r8.im"
"""Replicate's registry of images."""

LOGIN = ["cog", "login", "--token-stdin"]

CLI_TOKEN = "REPLICATE_CLI_AUTH_TOKEN"
"""The variable with the token that `cog login` takes, named as in Cog's own workflow template."""

CLI_TOKEN_PAGE = "replicate.com/auth/token"
"""Where a user finds that token."""

API_TOKEN_PREFIX = "r8_"
"""Of tokens for the HTTP API, which `cog login` refuses."""

_DIGEST = re.compile(r"digest:\s*sha256:([0-9a-f]{64})|@sha256:([0-9a-f]{64})")
_LAST_LINES = 6
_LINE = 300


def command(model: str, settings: Push) -> list[str]:
    """The command that builds the image and pushes it to a model, owner/name."""
    layers = ["--separate-weights"] if settings.weights == "layer" else []
    return ["cog", "push", f"{REGISTRY}/{model}", *layers, "--progress", "plain"]


def cli_token() -> str | None:
    """The token for `cog login` from the environment, or None."""
    return os.environ.get(CLI_TOKEN, "").strip() or None


def environment(*secrets: str | None) -> dict[str, str]:
    """The environment of `cog` and the build, without tokens and without any variable that holds a secret."""
    known = [secret for secret in secrets if secret]
    kept = {
        name: value
        for name, value in os.environ.items()
        if "TOKEN" not in name.upper() and not any(secret in value for secret in known)
    }
    return kept | {"COG_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}


OLDEST = (0, 22)
"""The first release that checks a project without building it; an older one would run `cog run`'s words in an image."""

VERDICT_SECONDS = 60.0
"""Timeout of each of these commands; Cog takes about a second."""

_ASKED = re.compile(r"(unknown|missing required) input", re.IGNORECASE)
"""Cog's refusal of the input alone, after it has accepted the project."""

_NO_COMMAND = re.compile(r"unknown (command|flag|shorthand)", re.IGNORECASE)
_DEPRECATED = re.compile(r"deprecat", re.IGNORECASE)
_UNKNOWN_PAIR = "Cog doesn't know if CUDA"
"""A harmless notice about each CUDA and torch that is newer than Cog's own table."""

_MARKS = "\u2717\u2a2f\u2179\u26a0\u00d7 "
"""Before Cog's errors and warnings."""


@dataclass(frozen=True)
class Verdict:
    """What Cog says of a project.

    Attributes:
        asked: the commands that answered.
        refusals: why it would not build, in Cog's words.
        notices: what it says beside that.
        problem: why Cog cannot be asked.
    """

    asked: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()
    problem: str | None = None


def verdict(
    root: Path, program: str, version: str, modes: Sequence[str], *secrets: str | None, file: str = GPU_IMAGE
) -> Verdict:
    """Ask Cog whether it takes a project. It builds nothing and needs no Docker.

    Args:
        root: the project's folder.
        program: of `cog`.
        version: its version.
        modes: `run`, `train` or both: what cog.yaml names.
        secrets: kept out of the environment.
        file: what describes the image; `cog doctor` is asked of `cog.yaml` alone, the only one that it reads.
    """
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        return Verdict(problem=f"cog {version} cannot check a project without building it; 0.22 can")
    hidden = environment(*secrets) | {"COG_SKIP_DOCKER_CHECK": "1", "COG_SKIP_GPU_CHECK": "1"}
    # An input that no project has: Cog looks at the project first, then refuses the input and builds nothing.
    asked, refusals, notices = [], list[str](), dict[str, None]()
    usual = file == GPU_IMAGE
    questions = ([mode, *([] if usual else ["-f", file]), "-i", "nope=1"] for mode in modes)
    for words in (*([["doctor"]] if usual else []), *questions):
        try:
            done = subprocess.run(
                [program, *words],
                cwd=root,
                env=hidden,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=VERDICT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return Verdict(problem=f"cog {' '.join(words)} does not answer ({reason(error)})")
        said = (done.stdout + done.stderr).strip()
        if done.returncode and _NO_COMMAND.search(said):
            continue
        asked.append(words[0])
        lines = [line for line in said.splitlines() if line.strip() and _UNKNOWN_PAIR not in line]
        notices |= dict.fromkeys(line.strip(_MARKS) for line in lines if _DEPRECATED.search(line))
        if done.returncode and not _ASKED.search(said):
            kept = "\n".join(line for line in lines if not _DEPRECATED.search(line)) or said
            refusals.append(kept.strip(_MARKS) or f"cog {words[0]} ended with status {done.returncode}")
    if not asked:
        return Verdict(problem=f"cog {version} knows none of the commands that check a project")
    whole = [one for at, one in enumerate(refusals) if one not in refusals[:at]]
    return Verdict(tuple(asked), tuple(whole), tuple(notices))


def login(root: Path, token: str | None, *secrets: str | None) -> None:
    """Log in to Replicate's registry.

    Args:
        root: the project's folder.
        token: for Cog, not for the API.
        secrets: other tokens, which `cog` must not see.

    Raises:
        CogpressError: there is no token, it is one for the API, it is refused, or `cog` is not installed.
    """
    if token is None:
        raise CogpressError(
            f"Docker is not logged in to {REGISTRY} and {CLI_TOKEN} is not set. Run cog login, or set it to the token "
            f"from {CLI_TOKEN_PAGE}."
        )
    if token.startswith(API_TOKEN_PREFIX):
        raise CogpressError(
            f"{CLI_TOKEN} is an API token ({API_TOKEN_PREFIX}...), which cog login refuses. Set it to the token from "
            f"{CLI_TOKEN_PAGE}."
        )
    hidden = environment(token, *secrets)
    try:
        done = subprocess.run(
            LOGIN, cwd=root, env=hidden, input=token + "\n", capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise _missing(error) from None
    if done.returncode:
        told = redacted(" ".join((done.stderr or done.stdout).split())[-_LINE:], token, *secrets)
        raise CogpressError(f"cog login failed: {told}. Check {CLI_TOKEN}: the token is at {CLI_TOKEN_PAGE}.")


def push(
    root: Path, arguments: list[str], secrets: Sequence[str | None], log: Path, on_line: Callable[[str], None]
) -> str | None:
    """Build and push; returns the image's digest where the output has it.

    Args:
        root: the folder to build in.
        arguments: the whole command.
        secrets: kept out of the environment and redacted in the output.
        log: the file for the output.
        on_line: called with each line.

    Raises:
        CogpressError: it failed; quotes the end of its output.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    digest = None
    try:
        process = subprocess.Popen(
            arguments,
            cwd=root,
            env=environment(*secrets),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise _missing(error) from None
    assert process.stdout is not None
    try:
        with log.open("w", encoding="utf-8") as file:
            for raw in process.stdout:
                line = redacted(raw.rstrip("\n"), *secrets)
                file.write(line + "\n")
                file.flush()
                if found := _DIGEST.search(line):
                    digest = found.group(1) or found.group(2)
                if line.strip():
                    lines = [*lines[1 - _LAST_LINES :], line[:_LINE]]
                    on_line(line)
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        end = "".join(f"\n    {line}" for line in lines)
        raise CogpressError(
            f"{' '.join(arguments)} failed with exit status {status}. Its output ends:{end}\nAll of it is in {log}. "
            "Fix the problem and run this again: finished steps are not repeated."
        )
    return digest


def layers(model: str, *secrets: str | None) -> list[str]:
    """The digests of the layers of a model's image on this machine; empty where Docker has or knows none."""
    image = f"{REGISTRY}/{model}"
    command = ["docker", "image", "inspect", "--format", "{{json .RootFS.Layers}}", image]
    try:
        done = subprocess.run(
            command, env=environment(*secrets), capture_output=True, text=True, timeout=VERDICT_SECONDS, check=False
        )
        found = json.loads(done.stdout) if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return []
    return [str(one) for one in found] if isinstance(found, list) else []


def _missing(error: OSError) -> CogpressError:
    return CogpressError(f"Could not start cog ({error.strerror}). Install it as described at cog.run.")
