"""What pip is told, and what it says where it fails, in words that help.

It runs before any environment is there, as `environment` does: standard library only, in Python 3.8's syntax.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def torch_attempts(version: str) -> list[list[str]]:
    """pip's arguments for torch's CPU build, in the order they are tried.

    The configured index first: it may be a mirror that has it, and where it has not, the answer comes at once.
    Alone and without dependencies, because PyTorch's index has other packages too, in builds that are not locked.
    """
    torch = ["--no-deps", "--no-compile", "--only-binary", ":all:", "--retries", "1", f"torch=={version}+cpu"]
    return [torch, ["--index-url", PYTORCH_CPU_INDEX, "--timeout", "15", *torch]]


def locked_names(lock: str) -> list[str]:
    """The packages that a lock file names."""
    return [normalized(name) for name in re.findall(r"^([A-Za-z0-9._-]+)==", lock, re.M)]


def normalized(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def clean_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Without the settings that would make pip or Python work in another place than the new environment."""
    unwanted = {"PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"}
    kept = {name: value for name, value in variables.items() if name not in unwanted}
    # Set, not left out: these two may also come from a pip.conf, which variables win over.
    pip = {"PIP_USER": "0", "PIP_REQUIRE_HASHES": "0", "PIP_PROGRESS_BAR": "off"}
    return {**kept, **pip, "PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1", "NO_COLOR": "1"}


def without_credentials(text: str) -> str:
    """The text with the user and password of every URL in it left out."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


_CAUSES = (
    (r"No space left on device", "the disk is full. Make room and run again."),
    (
        r"DO NOT MATCH THE HASHES",
        "a package's file is not the one that was locked. Your package index serves another: use one that mirrors the "
        "public one.",
    ),
    (
        r"Temporary failure in name resolution|Name or service not known|Failed to establish a new connection|"
        r"Network is unreachable|Connection refused|ConnectTimeoutError|ReadTimeoutError|ProxyError|SSLError|"
        r"CERTIFICATE_VERIFY_FAILED",
        "the package index can not be reached. Check the network and pip's configuration (`pip config list`), then run "
        "again.",
    ),
    (
        r"No matching distribution found for (\S+)",
        "{0} is not in the package index. Check pip's configuration (`pip config list`), then run again.",
    ),
)


def explain(label: str, output: Sequence[str], log: Path) -> str:
    """What went wrong in a step and what to do, with the end of its output and where the rest is."""
    text = "\n".join(output)
    cause = "see why below."
    for pattern, words in _CAUSES:
        match = re.search(pattern, text)
        if match:
            cause = words.format(*match.groups())
            break
    tail = "\n".join("  " + line for line in [line for line in output if line.strip()][-6:])
    return (
        f"Setting up the environment stopped at '{label}': {cause} All of its output is in {log}; the end is:\n{tail}"
    )
