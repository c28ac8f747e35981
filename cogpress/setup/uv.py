"""How uv installs a lock file: pip's configuration in uv's terms, and what uv's errors mean."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}
"""uv's variable for each of pip's options; several values are separated by spaces."""

PYTORCH_CPU = "https://download.pytorch.org/whl/cpu/torch/"
"""PyTorch's page of torch's CPU builds. As a page of links it gives torch alone: PyTorch's index has other packages
too, in builds that are not locked."""


def settings(configuration: str) -> dict[str, str]:
    """The options in force for `pip install`, from the output of `pip config list`."""
    found: dict[str, str] = {}
    lines = re.findall(r"^(global|install|:env:)\.([\w-]+)=(.*)$", configuration, re.M)
    for section in ("global", "install", ":env:"):  # the later ones win, as in pip
        found.update({name: ast.literal_eval(value) for place, name, value in lines if place == section})
    return found


def variables(pip: Mapping[str, str]) -> dict[str, str]:
    """pip's options as uv's environment variables, so that uv looks for packages where pip is told to."""
    return {variable: " ".join(pip[name].split()) for name, variable in _VARIABLES.items() if name in pip}


def sync(python: str, locks: Sequence[str], pip: Mapping[str, str]) -> list[str]:
    """The command that makes the environment of `python` equal to the locks; what they do not name goes, pip stays.

    uv verifies the hashes that a lock has. A package may come from any of the configured indexes, as with pip: the
    hash decides which file is right.
    """
    command = [python, "-m", "uv", "pip", "sync", "--python", python, "--verify-hashes", "--only-binary", ":all:"]
    command += ["--index-strategy", "unsafe-best-match"]
    for place in pip.get("find-links", "").split():
        command += ["--find-links", place]
    if pip.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        command.append("--no-index")
    return [*command, *locks]


def without_credentials(text: str) -> str:
    """The text with the user and password of every URL in it left out."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


PROGRESS = r"Resolved|Downloading \S+ \((\d\d+\.\d+M|\S+G)iB|Prepared|Uninstalled|Installed|Bytecode|warning"
"""The lines of uv's output that are worth showing: its stages and its large downloads."""

FETCHING = r"Failed to (fetch|download|read `--find-links`)|No solution found|Request failed|No matching distribution"
"""Errors from before anything is changed: uv downloads all packages first."""

TORCH_MISSING = r"you\s+require\s+torch=="
"""What uv says where no index has torch's build."""

_CAUSES = (
    (r"No\s+space\s+left\s+on\s+device", "the disk is full. Make room, then run again."),
    (
        r"(?i)hash\s+mismatch|do\s+not\s+match\s+the\s+hashes",
        "a package's file is not the one that was locked. Use a package index that mirrors the public one.",
    ),
    (
        r"Failed to (?:fetch|download|read `--find-links`)|Request failed|new connection|name resolution|Proxy|SSL",
        "could not reach the package index. Check the network and pip's configuration (`pip config list`), then run "
        "again.",
    ),
    (
        r"you\s+require\s+([^\s,]+)|No\s+matching distribution found for (\S+)",
        "{0} is not in the package index. Check pip's configuration (`pip config list`), then run again.",
    ),
)


def explain(step: str, output: Sequence[str]) -> str:
    """Why a step failed and what to do, with the program's own words, which uv wraps anywhere."""
    text = without_credentials("\n".join(output))
    cause = "see below."
    for pattern, words in _CAUSES:
        match = re.search(pattern, text)
        if match:
            cause = words.format(*filter(None, match.groups()))
            break
    lines = [line for line in text.splitlines() if line.strip() and not re.match(r"\s*Download|" + PROGRESS, line)]
    start = next((number for number, line in enumerate(lines) if re.match("(?i)error", line)), max(0, len(lines) - 8))
    tail = "\n".join("  " + line for line in lines[start : start + 8])
    return f"Setting up the environment stopped at {step}: {cause}\n{tail}"
