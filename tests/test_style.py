"""Lint, format, types and the order of imports, for every file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["ruff check .", "ruff format --check .", "mypy"])
def test_tool_finds_no_fault(arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", *arguments.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}:\n{done.stdout}{done.stderr}"


def test_imports_follow_the_order_of_the_rooms(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pyproject.toml holds the order."""
    monkeypatch.chdir(ROOT)
    status = lint_imports(no_cache=True, no_logo=True)
    assert status == 0, capsys.readouterr().out


def test_scripts_are_python_and_can_be_run() -> None:
    for path in sorted((ROOT / "scripts").iterdir()):
        if path.is_file():
            assert path.read_text().startswith("#!/usr/bin/env python3\n"), path
            assert path.stat().st_mode & 0o111, f"{path} is not executable"


def test_lines_of_the_page_are_as_short_as_pythons() -> None:
    page = ROOT / "cogpress" / "playground" / "page"
    paths = [path for path in sorted(page.rglob("*.js")) if "vendor" not in path.parts]
    assert paths
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 120, f"{path.relative_to(ROOT)}:{number}"


def test_no_file_names_a_package_registry_or_a_machine() -> None:
    """What is written here must hold on any machine, with any package index."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    hosts = r"pypi\.(org|python)|files\.python" + "hosted"
    folders = r"(?<![\w.])/(work|root|opt)/"
    found = []
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix not in {".png", ".woff2", ".gz", ".safetensors", ".parquet"}:
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{name}: {match.group()}" for match in re.finditer(f"{hosts}|{folders}", text)]
    assert found == []
