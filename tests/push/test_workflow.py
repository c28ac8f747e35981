"""The users' GitHub workflow: its commands exist, and only the push sees the token."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogpress.cog.process import read_cog_yaml
from tests import Script

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / ".github" / "workflows" / "model.yml").read_text()
WORKFLOW: dict[Any, Any] = yaml.safe_load(TEXT)
JOBS: dict[str, Any] = WORKFLOW["jobs"]


def commands(job: str) -> list[list[str]]:
    """Each command that a job runs, as words."""
    lines = [line for step in JOBS[job]["steps"] for line in step.get("run", "").splitlines()]
    return [shlex.split(line) for line in lines if line.strip()]


def test_pull_requests_are_checked_and_tags_are_pushed() -> None:
    on = WORKFLOW[True]  # YAML reads the word `on` so
    assert set(on) == {"pull_request", "push"}
    assert on["push"] == {"tags": ["v*"]}
    assert "if" not in JOBS["check"]
    assert JOBS["push"]["if"] == "github.ref_type == 'tag'"
    assert JOBS["push"]["needs"] == "check"
    assert [words[0] for words in commands("check")] == ["sudo", "scripts/setup", "scripts/preflight", "scripts/test"]
    assert commands("push")[-1] == ["scripts/push", "$MODEL"]


def test_answers_are_uploaded_from_private_repositories_alone() -> None:
    steps = [step for job in JOBS.values() for step in job["steps"] if "upload-artifact" in step.get("uses", "")]
    assert [step["if"] for step in steps] == ["always() && github.event.repository.private"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for job in JOBS for words in commands(job)], ids=" ".join)
def test_each_command_exists_with_its_options(words: list[str], script: Script) -> None:
    if not words[0].startswith("scripts/"):
        assert words[:2] in (["sudo", "apt-get"], ["sudo", "curl"], ["sudo", "chmod"], ["cog", "--version"])
        return
    assert (ROOT / words[0]).is_file()
    status, shown, _ = script(words[0].removeprefix("scripts/"), "--help")
    assert status == 0
    options = [word for word in words[1:] if word.startswith("--")]
    assert not [option for option in options if option not in shown]


def test_the_tests_that_are_left_out_are_by_markers_that_exist() -> None:
    [words] = [words for words in commands("check") if words[0] == "scripts/test"]
    named = set(re.findall(r"\w+", words[words.index("-m") + 1])) - {"not", "and"}
    assert named <= set(re.findall(r'^    "(\w+):', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


def test_the_topics_that_are_left_out_exist() -> None:
    from cogpress.preflight import run as preflight

    [words] = [words for words in commands("check") if words[0] == "scripts/preflight"]
    skipped = [words[at + 1] for at, word in enumerate(words) if word == "--skip"]
    assert skipped
    assert set(skipped) <= set(preflight.TOPICS)


def test_only_the_push_sees_the_tokens_and_never_on_a_command_line() -> None:
    assert TEXT.count("secrets.") == 2
    [step] = [step for step in JOBS["push"]["steps"] if "secrets." in str(step)]
    for name in ("REPLICATE_API_TOKEN", "REPLICATE_CLI_AUTH_TOKEN"):
        assert step["env"][name] == f"${{{{ secrets.{name} }}}}"
    # What is put into a command as text could be a command itself.
    assert not [step for job in JOBS.values() for step in job["steps"] if "${{" in step.get("run", "")]
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert JOBS["push"]["environment"] == "replicate"


def test_cog_is_the_images() -> None:
    wanted = read_cog_yaml(ROOT)["build"]["sdk_version"]
    assert f"/v{wanted}/cog_Linux_x86_64" in TEXT


def test_actions_are_pinned_to_a_release() -> None:
    used = [step["uses"] for job in JOBS.values() for step in job["steps"] if "uses" in step]
    assert used
    assert not [name for name in used if not re.fullmatch(r"actions/[a-z/-]+@v\d+", name)]
