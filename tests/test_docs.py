"""What the pages say of commands, options, places and messages is true."""

from __future__ import annotations

import ast
import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cogpress import config
from cogpress.cog import schema
from cogpress.config import Config
from tests import Script

ROOT = Path(__file__).resolve().parents[1]
README, AGENTS, TROUBLES = ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "docs" / "troubleshooting.md"
PAGES = [README, AGENTS, ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
SOURCES = [*(ROOT / "cogpress").rglob("*.py"), *ROOT.glob("*.py")]


def cells(page: Path) -> list[list[str]]:
    """The rows of a page's tables, headings left out."""
    lines = [line for line in TEXTS[page].splitlines() if line.lstrip().startswith("| ")]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]


def test_a_page_of_its_kind_stays_short() -> None:
    for page, most in {README: 200, AGENTS: 60, TROUBLES: 100}.items():
        assert len(TEXTS[page].splitlines()) <= most, page.name


@functools.cache
def written() -> str:
    """Every text in the source, with an ellipsis for what is filled in when it runs."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        return "".join(map(text, node.values)) if isinstance(node, ast.JoinedStr) else "…"

    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return "\n".join(text(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr))


@pytest.mark.slow
def test_messages_name_options_that_there_are() -> None:
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    options = {name: section.model_fields for name, section in sections.items() if hasattr(section, "model_fields")}
    # No file, and no link to a page.
    pattern = rf"(?<![\w./])({'|'.join(options)})\.([a-z_]+)\b(?<!\.py)(?<!\.md)(?<!\.json)(?<!\.png)(?<!\.in)"
    unknown = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
                unknown |= {
                    f"{path.name}: {found[0]}"
                    for found in re.finditer(pattern, node.value)
                    if found[2] not in options[found[1]]
                }
    assert unknown == set()


def quoted() -> Iterator[str]:
    """The messages of cogpress that the page of problems quotes: code of three words or more in a first column."""
    for row in cells(TROUBLES):
        found = re.findall(r"`([^`]+)`", row[0])
        yield from (code for code in found if len(code.split()) > 2)


@pytest.mark.slow
@pytest.mark.parametrize("message", list(quoted()))
def test_a_quoted_message_is_in_the_source(message: str) -> None:
    parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
    assert re.search("[^\n]*".join(parts), written()), message


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_are_there(page: Path) -> None:
    found = re.findall(r"\b(?:cogpress|tests|bench|examples|requirements|scripts)/[\w./-]*\w", TEXTS[page])
    assert [name for name in found if not (ROOT / name).exists()] == []


def test_the_picture_has_every_room() -> None:
    page = TEXTS[ROOT / "docs" / "developing.md"]
    package = ROOT / "cogpress"
    rooms = [path.parent for path in package.glob("*/__init__.py")] + list(package.glob("[!_]*.py"))
    assert [room.name for room in rooms if not re.search(rf"^  .*\b{re.escape(room.name)}", page, re.MULTILINE)] == []


def commands() -> list[str]:
    """Each command of cogpress that a page shows as one to be typed."""
    found = []
    for text in TEXTS.values():
        for block in re.findall(r"^ *```(?:bash|sh)?\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [line.strip() for line in lines if re.match(r" *scripts/\w", line)]
    return sorted(set(found))


USAGES: dict[str, str] = {}
"""What each script says to --help."""


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_a_command_shown_has_these_options(line: str, script: Script) -> None:
    name, *words = shlex.split(line, comments=True)
    assert (ROOT / name).is_file(), line
    if name not in USAGES:
        status, USAGES[name], error = script(name.removeprefix("scripts/"), "--help")
        assert status == 0, error
    for option in (word.partition("=")[0] for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", USAGES[name]), f"{line}: no {option}"


def test_each_fact_about_cog_is_watched() -> None:
    rows = [row for row in cells(ROOT / "docs" / "cog.md") if row[0] != "fact"]
    assert len(rows) > 12
    for fact, watched, *_ in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", watched)
        assert tests, fact
        for file, name in tests:
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_every_page_is_led_to_from_the_readme() -> None:
    assert [page.name for page in PAGES[3:] if f"docs/{page.name}" not in TEXTS[README]] == []


def test_every_picture_is_shown() -> None:
    shown = "".join(TEXTS.values())
    assert [path.name for path in (ROOT / "docs").glob("*.png") if f"{path.name})" not in shown] == []


def test_the_picture_has_the_order_that_the_linter_holds() -> None:
    page = TEXTS[ROOT / "docs" / "developing.md"]
    order = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    layers = [layer.split(" | ") for layer in order]
    places = {name: re.search(rf"^  .*\b{name}(/|\.py)", page, re.MULTILINE) for layer in layers for name in layer}
    assert [name for name, place in places.items() if place is None] == []
    lines = [[page[: place.start()].count("\n") for name in layer if (place := places[name])] for layer in layers]
    below = [max(line) for line in lines if line]
    assert below == sorted(below)


def test_the_ten_options_of_the_readme_have_these_defaults() -> None:
    rows = [row for row in cells(README) if re.fullmatch(r"`(name|\w+\.\w+)`", row[0])]
    assert len(rows) == 10
    defaults = Config().model_dump()
    for option, _, default in rows:
        section, _, name = option.strip("`").partition(".")
        value = defaults[section][name] if name else defaults[section]
        shown = f"{value:g}" if isinstance(value, float) else str(value or "none")
        assert default.strip("`") == shown, option


def test_the_inputs_are_those_of_the_runner() -> None:
    rows = [row for row in cells(ROOT / "docs" / "serving.md") if row[0].startswith("`")]
    named = sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[0]))
    own = config.load(ROOT / "model.yaml").prompt.fields
    assert named == sorted(schema.inputs(ROOT, "predict.py:Runner").keys() - own.keys())
