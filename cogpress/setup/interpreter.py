"""Check that the locked packages run on this machine, and find a Python for them."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from typing import Tuple

from cogpress.errors import CogpressError

PYTHONS = ((3, 11), (3, 12), (3, 13))
"""The Pythons that the locks are for; tests run on the first."""

OLDEST_GLIBC = (2, 31)

Version = Tuple[int, int]


def check_platform(system: str, machine: str, libc: tuple[str, str]) -> None:
    """Refuse machines that the locked binary packages do not run on.

    Raises:
        CogpressError: this is not Linux on x86-64 with a recent glibc.
    """
    needs = "cogpress needs Linux on x86-64 with glibc {}.{} or newer".format(*OLDEST_GLIBC)
    advice = "Use such a machine, or a container or virtual machine of that kind."
    if not system.startswith("linux") or machine.lower() not in ("x86_64", "amd64"):
        raise CogpressError(f"{needs}; this is {system} on {machine}. {advice}")
    if libc[0] != "glibc":
        raise CogpressError(f"{needs}; this Linux has a different C library. {advice}")
    if tuple(int(part) for part in re.findall(r"\d+", libc[1])[:2]) < OLDEST_GLIBC:
        raise CogpressError(f"{needs}; this one has {libc[1]}. {advice}")


def find_interpreter() -> tuple[str, Version]:
    """Find a Python to create the environment with: the running one, else one on PATH.

    Raises:
        CogpressError: none fits, or the one that fits has no venv module.
    """
    running: str = getattr(sys, "_base_executable", "") or sys.executable
    names = [f"python{dotted(version)}" for version in PYTHONS]
    candidates = [running, *(path for path in map(shutil.which, names) if path)]
    incomplete = None
    for candidate in candidates:
        version, complete = probe(candidate)
        if version not in PYTHONS:
            continue
        if complete:
            return candidate, version
        incomplete = incomplete or (candidate, version)
    if incomplete:
        path, version = incomplete
        raise CogpressError(
            f"{path} has no venv module. Install it (Debian, Ubuntu: apt-get install python{dotted(version)}-venv), "
            "then run again."
        )
    wanted = f"{', '.join(map(dotted, PYTHONS[:-1]))} or {dotted(PYTHONS[-1])}"
    first = f"python{dotted(PYTHONS[0])}"
    raise CogpressError(
        f"cogpress needs Python {wanted}; this is {platform.python_version()}, and none of those is on PATH. Install "
        f"one (Debian, Ubuntu: apt-get install {first} {first}-venv), then run again."
    )


def probe(python: str) -> tuple[Version | None, bool]:
    """An interpreter's version, None if it does not start, and whether it can create environments."""
    code = "import sys; print(*sys.version_info[:2], flush=True); import venv, ensurepip, ssl"
    try:
        done = subprocess.run([python, "-I", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None, False
    numbers = done.stdout.split()
    return ((int(numbers[0]), int(numbers[1])), done.returncode == 0) if len(numbers) == 2 else (None, False)


def dotted(version: Version) -> str:
    """`(3, 11)` as `3.11`."""
    return ".".join(map(str, version))
