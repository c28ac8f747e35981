"""All checks of a project: gather the facts, check them, and apply the safe fixes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from cogpress.errors import CogpressError
from cogpress.preflight import cogyaml, form, image, packages, place, signature, weights
from cogpress.preflight.check import Check, Finding, Row, failed
from cogpress.preflight.facts import Facts, Request, gather
from cogpress.preflight.fix import fix
from cogpress.preflight.report import Report
from cogpress.redact import redacted

CHECKS: list[Check] = [
    *cogyaml.CHECKS,
    *signature.CHECKS,
    *form.CHECKS,
    *packages.CHECKS,
    *weights.CHECKS,
    *image.CHECKS,
    *place.CHECKS,
]

TOPICS = tuple(dict.fromkeys(one.topic.lower() for one in CHECKS))
"""What can be skipped, in the order of the checks."""


def run(request: Request, *, fixes: bool = False, skip: Sequence[str] = ()) -> Report:
    """Gather the facts and check; with `fixes`, apply the safe fixes and check again.

    Args:
        request: what to push, and where.
        fixes: write `.dockerignore` entries and recover from interrupted writers.
        skip: topics of `TOPICS` to leave out.
    """
    started = time.perf_counter()
    if "replicate" in skip and "weights" in skip:
        request = replace(request, offline=True)  # no check would read the answers
    facts = gather(request)
    done: list[str] = []
    if fixes:
        done = list(fix(facts))
        facts = gather(request) if done else facts
    return Report(check(facts, skip), time.perf_counter() - started, tuple(done))


def check(facts: Facts, skip: Sequence[str] = ()) -> list[Row]:
    """The findings of all checks except those of skipped topics."""
    wanted = [one for one in CHECKS if one.topic.lower() not in skip]
    return [Row(one.topic, one.name, finding) for one in wanted for finding in _look(one, facts)]


def _look(one: Check, facts: Facts) -> list[Finding]:
    try:
        found = list(one.look(facts))
    except CogpressError as error:
        found = [failed(str(error), "Correct it and run again.")]
    # A message can quote a file or a program, and thereby a secret.
    tokens = (facts.machine.token, facts.machine.cli_token)
    return [
        replace(finding, message=redacted(finding.message, *tokens), fix=redacted(finding.fix, *tokens))
        for finding in found
    ]
