"""The environment of the libraries in requirements/clients.lock."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from cogpress.setup import uv

LOCK = Path(__file__).resolve().parents[2] / "requirements" / "clients.lock"


def python(cache: Path) -> Path:
    """Its Python; made on first use, in seconds, or the test is skipped."""
    folder = cache / f"clients-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:12]}"
    made, interpreter = folder / "made", folder / "bin" / "python"
    with filelock.FileLock(cache / "clients.lock"):
        if not made.exists():
            pip = [sys.executable, "-m", "pip", "config", "list"]
            configured = uv.settings(subprocess.run(pip, capture_output=True, text=True).stdout)
            [_, *install] = uv.sync(str(interpreter), [str(LOCK)], configured)
            environ = {**uv.variables(configured), **os.environ}
            for command in (["-m", "uv", "venv", "--clear", "--python", sys.executable, str(folder)], install):
                done = subprocess.run(
                    [sys.executable, *command], env=environ, capture_output=True, text=True, timeout=300
                )
                if done.returncode:
                    pytest.skip(f"uv cannot install requirements/clients.lock here: {done.stderr.strip()[-300:]}")
            made.touch()
    return interpreter
