"""Check where the push comes from and goes to: programs, log-in, disk; Replicate's account, model and hardware."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rich.filesize import decimal as size

from cogpress.cog.program import API_TOKEN_PREFIX, CLI_TOKEN, CLI_TOKEN_PAGE, REGISTRY
from cogpress.http import Reply
from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some, warning
from cogpress.preflight.facts import Facts
from cogpress.replicate.api import explained

MACHINE, REPLICATE = "Machine", "Replicate"

IMAGE_BYTES = 30_000_000_000
"""Disk that a build needs beside the weights: CUDA, torch, vLLM and their downloads."""

API_TOKEN_PAGE = "replicate.com/account/api-tokens"

NAME = re.compile(r"[a-z0-9][a-z0-9._-]*/[a-z0-9][a-z0-9._-]*", re.IGNORECASE)


def _docker(facts: Facts) -> Iterator[Finding]:
    docker = facts.machine.docker
    if docker.path is None:
        yield failed("docker is not on the PATH; cog builds with it.", "Install Docker Engine or Docker Desktop.")
    elif docker.problem:
        yield failed(f"docker {docker.problem}.", "Start Docker, and give your user access to it.")
    else:
        yield passed(f"docker {docker.version}")


def _cog(facts: Facts) -> Iterator[Finding]:
    cog, wanted = facts.machine.cog, facts.build.get("sdk_version")
    if cog.path is None:
        yield failed("cog is not on the PATH.", "Install the version in build.sdk_version, as cog.run describes.")
    elif cog.problem:
        yield failed(f"cog {cog.problem}.", "Reinstall it as cog.run describes.")
    elif isinstance(wanted, str) and _minor(cog.version) < _minor(wanted):
        yield failed(f"cog is {cog.version}, older than the image's {wanted}, which it cannot build.", "Update cog.")
    else:
        yield passed(f"cog {cog.version}")


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _login(facts: Facts) -> Iterator[Finding]:
    here, token = facts.machine, facts.machine.cli_token
    problem = None if token is None else _cli_token_problem(token)
    fix = f"cog login, or set {CLI_TOKEN} to the token from {CLI_TOKEN_PAGE}."
    if here.logged_in is not False and problem:
        yield warning(f"{problem} The existing log-in is used.", f"Unset {CLI_TOKEN}.")
    elif here.logged_in:
        yield passed(f"Docker is logged in to {REGISTRY}")
    elif here.logged_in is None:
        yield passed("Docker keeps its log-ins in the system's credential store, which is not read")
    elif token is None:
        yield failed(f"Docker is not logged in to {REGISTRY}, and {CLI_TOKEN} is not set.", fix)
    elif problem:
        yield failed(problem, fix)
    else:
        yield passed(f"scripts/push logs in to {REGISTRY} with {CLI_TOKEN}")


def _cli_token_problem(token: str) -> str | None:
    if token.startswith(API_TOKEN_PREFIX):
        return f"{CLI_TOKEN} is an API token ({API_TOKEN_PREFIX}...), which cog login refuses."
    return f"{CLI_TOKEN} is not a token: it has spaces or is too short." if _odd(token) else None


def _odd(token: str) -> bool:
    return bool(re.search(r"\s", token)) or len(token) < 8


def _token(facts: Facts) -> Iterator[Finding]:
    token = facts.machine.token
    fix = f"Set it to a token from {API_TOKEN_PAGE}; keep it out of files here."
    if token is None:
        yield failed("REPLICATE_API_TOKEN is not set.", fix)
    elif _odd(token):
        yield failed("REPLICATE_API_TOKEN is not a token: it has spaces or is too short.", fix)
    elif token == facts.machine.cli_token:
        yield failed(f"REPLICATE_API_TOKEN and {CLI_TOKEN} are the same token; the API and cog need one each.", fix)
    elif not token.startswith(API_TOKEN_PREFIX):
        yield warning(f"REPLICATE_API_TOKEN does not begin with {API_TOKEN_PREFIX}, as the API's tokens do.", fix)
    else:
        yield passed("REPLICATE_API_TOKEN is set")


def _disk(facts: Facts) -> Iterator[Finding]:
    free, needed = facts.machine.free, IMAGE_BYTES + 3 * sum(entry.size for entry in facts.entries)
    if free < needed / 3:
        yield failed(f"{size(free)} of disk is free; a build needs about {size(needed)}.", "docker system prune")
    elif free < needed:
        yield warning(f"{size(free)} of disk is free; a build needs up to {size(needed)}.", "docker system prune")
    else:
        yield passed(f"{size(free)} free, about {size(needed)} needed where Docker's files are on this disk")


def _account(facts: Facts) -> Iterator[Finding]:
    asked = facts.replicate
    if asked.problem:
        yield _unasked(facts)
        return
    answer = asked.answers["/v1/account"]
    if isinstance(answer.content, dict):
        yield passed(f"the token belongs to {answer.content.get('username')}")
    else:
        yield _refused(answer, "the account")


def _unasked(facts: Facts) -> Finding:
    problem = facts.replicate.problem or ""
    if not facts.replicate.tried:
        return skipped(problem)
    return failed(problem, "Check the network and REPLICATE_BASE_URL, then run this again.")


def _refused(answer: Reply, what: str) -> Finding:
    """A 4xx, and what it asks of the user."""
    message, fix = explained(answer, what)
    return failed(message, fix)


def _destination(facts: Facts) -> Iterator[Finding]:
    destination = facts.destination
    if destination is None:
        yield skipped("no destination is named", "scripts/preflight owner/name")
        return
    if not NAME.fullmatch(destination):
        yield failed(f"{destination!r} is not owner/name.", "Write it as in its page's address: owner/name.")
        return
    if facts.replicate.problem:
        yield skipped(f"{destination} was not checked: {facts.replicate.problem}")
        return
    answer = facts.replicate.answers[f"/v1/models/{destination}"]
    account = facts.replicate.answers["/v1/account"].content
    user = account.get("username") if isinstance(account, dict) else None
    if answer.status == 404:
        if user and destination.split("/")[0].lower() != str(user).lower():
            yield warning(
                f"{destination} does not exist, and the token is {user}'s.",
                f"Create it on the web page if {destination.split('/')[0]} is your organisation, or name "
                f"{user}/{destination.split('/')[1]}.",
            )
        else:
            yield warning(f"{destination} does not exist yet.", "scripts/push creates it, or replicate.com/create.")
    elif not isinstance(answer.content, dict):
        yield _refused(answer, destination)
    else:
        yield passed(f"{destination} exists, {answer.content.get('visibility') or 'of unknown visibility'}")


def _hardware(facts: Facts) -> Iterator[Finding]:
    wanted = facts.request.hardware
    if not wanted or wanted == "auto":
        yield skipped("no hardware is named", "--hardware SKU")
        return
    if facts.replicate.problem:
        yield skipped(f"{wanted} was not checked: {facts.replicate.problem}")
        return
    answer = facts.replicate.answers["/v1/hardware"]
    if not isinstance(answer.content, list):
        yield _refused(answer, "the hardware")
        return
    known: dict[str, Any] = {
        str(item.get("sku")): item.get("name") for item in answer.content if isinstance(item, dict)
    }
    if wanted not in known:
        yield failed(f"Replicate has no hardware {wanted}.", f"Name one of {some(known, 12)}.")
    else:
        yield passed(f"{wanted}: {known[wanted]}")


CHECKS = [
    Check(MACHINE, "Docker", _docker),
    Check(MACHINE, "Cog", _cog),
    Check(MACHINE, "log-in", _login),
    Check(MACHINE, "token", _token),
    Check(MACHINE, "disk", _disk),
    Check(REPLICATE, "account", _account),
    Check(REPLICATE, "destination", _destination),
    Check(REPLICATE, "hardware", _hardware),
]
