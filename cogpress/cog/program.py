"""Run `cog login` and `cog push`. A token goes to the program's standard input alone."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from cogpress.config import Push
from cogpress.errors import CogpressError
from cogpress.redact import redacted

REGISTRY = "r8.im"
"""Replicate's registry of images."""

LOGIN = ["cog", "login", "--token-stdin"]

_DIGEST = re.compile(r"digest:\s*sha256:([0-9a-f]{64})|@sha256:([0-9a-f]{64})")
_LAST_LINES = 6
_LINE = 300


def command(model: str, settings: Push) -> list[str]:
    """The command that builds the image and pushes it to a model, owner/name."""
    layers = ["--separate-weights"] if settings.weights == "layer" else []
    return ["cog", "push", f"{REGISTRY}/{model}", *layers, "--progress", "plain"]


def environment(token: str) -> dict[str, str]:
    """The environment of `cog` and the build, without tokens."""
    kept = {name: value for name, value in os.environ.items() if "TOKEN" not in name.upper() and token not in value}
    return kept | {"COG_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}


def login(root: Path, token: str) -> None:
    """Log in to Replicate's registry.

    Raises:
        CogpressError: it is refused, or `cog` is not installed.
    """
    try:
        done = subprocess.run(
            LOGIN, cwd=root, env=environment(token), input=token + "\n", capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise _missing(error) from None
    if done.returncode:
        told = redacted(" ".join((done.stderr or done.stdout).split())[-_LINE:], token)
        raise CogpressError(f"cog login failed: {told}. Check REPLICATE_API_TOKEN.")


def push(root: Path, arguments: list[str], token: str, log: Path, on_line: Callable[[str], None]) -> str | None:
    """Build and push; returns the image's digest where the output has it.

    Args:
        root: the project's folder.
        arguments: the whole command.
        token: redacted in the output.
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
            env=environment(token),
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
                line = redacted(raw.rstrip("\n"), token)
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


def _missing(error: OSError) -> CogpressError:
    return CogpressError(f"Could not start cog ({error.strerror}). Install it as described at cog.run.")
