"""What this machine has for a push: programs, log-ins, disk, git. Changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

from cogpress.cog.program import REGISTRY, cli_token
from cogpress.errors import reason
from cogpress.files import read_json

SECONDS = 15
"""Longest time that a program may take to report its version."""


@dataclass(frozen=True)
class Program:
    """A program on the PATH: `version` if it answered, else `problem`."""

    path: str | None
    version: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Git:
    """The project's repository: its commit, changed, untracked and tracked files."""

    commit: str
    changed: list[str]
    untracked: list[str]
    tracked: frozenset[str]


@dataclass(frozen=True)
class Machine:
    """This machine; `logged_in` is None if only a store knows; `token` is for the API, `cli_token` for Cog."""

    docker: Program
    cog: Program
    logged_in: bool | None
    free: int
    token: str | None = field(repr=False, default=None)
    cli_token: str | None = field(repr=False, default=None)
    git: Git | None = None


def look(root: Path) -> Machine:
    """Ask programs and read files; nothing is sent anywhere."""
    return Machine(
        docker=_ask("docker", "info", "--format", "{{.ServerVersion}}"),
        cog=cog(),
        logged_in=logged_in(),
        free=shutil.disk_usage(root).free,
        token=os.environ.get("REPLICATE_API_TOKEN", "").strip() or None,
        cli_token=cli_token(),
        git=_git(root),
    )


def cog() -> Program:
    """Cog's program."""
    return _ask("cog", "--version")


def _ask(name: str, *arguments: str) -> Program:
    path = shutil.which(name)
    if path is None:
        return Program(None, problem="is not on the PATH")
    # A program that reports its version needs no token.
    environment = {key: value for key, value in os.environ.items() if "TOKEN" not in key}
    environment |= {"COG_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}
    try:
        done = subprocess.run(
            [path, *arguments], env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Program(path, problem=f"does not answer ({reason(error)})")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        return Program(path, problem=f"says: {lines[-1][:200].rstrip('.?! ')}")
    found = re.search(r"\d+\.\d+(\.\d+)?\S*", done.stdout)
    return Program(path, version=found.group() if found else done.stdout.strip()[:40])


def logged_in() -> bool | None:
    """Whether Docker's configuration knows the registry as Cog reads it; None if only a store of the system knows.

    Cog reads `auths` and `credsStore`, but not `credHelpers`.
    """
    folder = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
    try:
        content = read_json(folder / "config.json")
    except (OSError, ValueError):
        return False
    if not isinstance(content, dict):
        return False
    if any(re.sub(r"^https?://", "", place).split("/")[0] == REGISTRY for place in content.get("auths") or {}):
        return True
    return None if content.get("credsStore") else False


def _git(root: Path) -> Git | None:
    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    status = ask("status", "--porcelain", "-z", "--no-renames", "--", ".")
    if status is None:
        return None
    lines = [line for line in status.split("\0") if line]
    return Git(
        commit=(ask("rev-parse", "--short=12", "HEAD") or "").strip(),
        changed=[line[3:] for line in lines if not line.startswith("??")],
        untracked=[line[3:] for line in lines if line.startswith("??")],
        tracked=frozenset(filter(None, (ask("ls-files", "-z") or "").split("\0"))),
    )
