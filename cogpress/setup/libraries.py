"""Shared libraries that the installed wheels need from the system: which are missing, and what installs them."""

from __future__ import annotations

import ctypes
import re
import subprocess
from typing import TYPE_CHECKING

from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

PACKAGES = {
    "libnuma.so.1": ("libnuma1", "numactl-libs"),
    "libgomp.so.1": ("libgomp1", "libgomp"),
    "libstdc++.so.6": ("libstdc++6", "libstdc++"),
    "libgcc_s.so.1": ("libgcc-s1", "libgcc"),
}
"""What installs each library: on Debian and Ubuntu, on Fedora."""

DRIVER = {"libcuda.so.1", "libnvidia-ml.so.1"}
"""The NVIDIA driver's own, which a GPU machine has and an image's build may lack."""


def absent(names: Iterable[str]) -> list[str]:
    """Those of the libraries that this system's loader does not find."""
    return [name for name in names if not _loads(name)]


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def needed(site_packages: Path) -> list[str]:
    """What torch's and vLLM's own libraries ask for and neither the system nor any installed wheel brings.

    A wheel finds libraries of other wheels once those are imported, which `ldd` does not know: what lies anywhere in
    the environment counts as there.
    """
    files = [path for name in ("torch", "vllm") for path in (site_packages / name).rglob("*.so*")]
    if not files:
        return []
    try:
        done = subprocess.run(
            ["ldd", *map(str, files)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False
        )
    except OSError:  # no ldd here
        return []
    missing = set(re.findall(r"^\s+(\S+) => not found", done.stdout, re.M))
    return sorted(missing - {path.name for path in site_packages.rglob("*.so*")} - DRIVER)


def check(missing: Iterable[str]) -> None:
    """Refuse to go on without these libraries.

    Raises:
        CogpressError: there are some; names the packages that bring them.
    """
    missing = list(missing)
    if not missing:
        return
    known = [PACKAGES[name] for name in missing if name in PACKAGES]
    debian, fedora = (" ".join(names) for names in zip(*known)) if known else ("", "")
    how = f" (Debian, Ubuntu: apt-get install {debian}; Fedora: dnf install {fedora})" if known else ""
    raise CogpressError(
        f"This system lacks {', '.join(missing)}, which torch or vLLM needs. Install it{how}, then run again."
    )
