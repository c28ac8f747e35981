"""What the pages say of commands, places and messages holds."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.standins import messages

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}


def test_every_message_is_findable() -> None:
    again = (
        "An error's message is not in docs/troubleshooting.md as it is in the source: python tests/standins/messages.py"
    )
    assert messages.page() == messages.PAGE.read_text(encoding="utf-8"), again
    unfiled = [message for topic, message in messages.messages() if topic not in messages.TOPICS]
    assert unfiled == [], "tests/standins/messages.py has no topic for the files of these"


def test_the_list_has_what_a_user_sees() -> None:
    whole = messages.PAGE.read_text(encoding="utf-8")
    for seen in ("does not exist. Copy model.yaml from the repository", "The prompt is", "The environment needs"):
        assert seen in whole


def anchors(text: str) -> set[str]:
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            to = (page.parent / name).resolve() if name else page
            assert to.exists(), f"{page.name} leads to {target}"
            if anchor:
                assert anchor in anchors(TEXTS[to]), f"{page.name} leads to {target}"


def commands() -> list[str]:
    """Each command of the kit that a page shows as one to be typed."""
    found = []
    for text in TEXTS.values():
        for block in re.findall(r"^ *```(?:bash|sh)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [line.strip() for line in lines if line.strip().startswith("scripts/")]
    return sorted(set(found))


@functools.cache
def usage(script: str) -> str:
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("line", commands())
def test_a_command_shown_has_these_options(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert (ROOT / words[0]).is_file(), line
    for option in (word.partition("=")[0] for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", usage(words[0])), f"{line}: no {option}"


def test_every_page_is_led_to_from_the_readme() -> None:
    readme = TEXTS[ROOT / "README.md"]
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []
