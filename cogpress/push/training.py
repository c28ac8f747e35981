"""A training on Replicate: the examples uploaded, its log followed while it runs, its weights fetched and checked.

Knows what Replicate tells of a training; leaves the inputs to `train.py` and fetching to `fetch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogpress.cog import schema
from cogpress.config import TestTraining
from cogpress.errors import CogpressError
from cogpress.push import cases
from cogpress.redact import redacted
from cogpress.replicate.api import ENDED, Replicate
from cogpress.weights import fetch

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Trained:
    """A training that succeeded.

    Attributes:
        id: of the training.
        version: `owner/name:id` of the version that it made; empty where it made none.
        weights: the address of the weights; empty where it tells none.
        metrics: of the training.
        seconds: that it ran.
    """

    id: str
    version: str
    weights: str
    metrics: dict[str, Any]
    seconds: float


def trainer(replicate: Replicate, name: str) -> tuple[str, str, dict[str, Any]]:
    """The model, version and document that trains: `owner/name`, or `owner/name:version`.

    Raises:
        CogpressError: there is none, or it can not be trained.
    """
    model, _, version = name.partition(":")
    found = replicate.version(model, version) if version else (replicate.model(model) or {}).get("latest_version")
    if not found:
        raise CogpressError(f"Replicate has no version {name} to train with. Push one with scripts/push {model}.")
    document = found.get("openapi_schema") or {}
    if "TrainingInput" not in document.get("components", {}).get("schemas", {}):
        raise CogpressError(f"{name} can not be trained: its cog.yaml names no `train:`. Push a version that has one.")
    return model, str(found["id"]), document


def start(
    replicate: Replicate, name: str, destination: str, data: Path, inputs: Mapping[str, Any], hardware: str = ""
) -> dict[str, Any]:
    """Upload the examples and start a training.

    Args:
        replicate: where.
        name: what trains, as `trainer` takes it.
        destination: owner/name of the model that gets the new version; made, private, where it does not exist.
        data: the examples.
        inputs: the training's other inputs; those that are None are left out.
        hardware: the SKU of a destination that is made.

    Raises:
        CogpressError: the file can not be read, or Replicate refuses.
    """
    model, version, document = trainer(replicate, name)
    given = {key: value for key, value in inputs.items() if value is not None}
    unknown = sorted(given.keys() - schema.fields(document, "TrainingInput").keys())
    if unknown:
        raise CogpressError(f"The training of {name} has no input {unknown[0]}. Push a version that has it.")
    if not data.is_file():
        raise CogpressError(f"There are no examples at {data}. Name them with --train-data, or as data.train.")
    if replicate.model(destination) is None:
        if not hardware:
            raise CogpressError(f"{destination} does not exist. Give --hardware SKU, and it is made, private.")
        owner, _, short = destination.partition("/")
        new = {"owner": owner, "name": short, "visibility": "private", "hardware": hardware}
        replicate.ask("POST", "/v1/models", new, what=f"a new model {destination}")
    body = {"destination": destination, "input": {**given, "train_data": replicate.upload(data)}}
    route = f"/v1/models/{model}/versions/{version}/trainings"
    # A training costs money: it must not be started twice.
    return dict(replicate.ask("POST", route, body, what=f"a training of {name}", once=True))


def follow(
    replicate: Replicate,
    made: dict[str, Any],
    on_log: Callable[[str], None],
    on_metrics: Callable[[str, dict[str, Any]], None] = lambda _status, _metrics: None,
    timeout: float | None = None,
) -> Trained:
    """Wait for a training's end, and pass on what it prints as it comes.

    Args:
        replicate: where.
        made: the training, as it was started.
        on_log: is told each new part of the log, of whole lines.
        on_metrics: is told the status and the metrics, whenever they have changed.
        timeout: seconds after which it is canceled; None for never.

    Raises:
        CogpressError: it fails, is canceled, or takes too long.
    """
    identifier, shown, before, began = str(made["id"]), "", None, time.monotonic()
    while True:
        logs = redacted(str(made.get("logs") or ""), replicate.token)
        if made.get("status") not in ENDED:
            logs = logs[: logs.rfind("\n") + 1]
        # Replicate keeps only the end of a long log.
        new = logs[len(shown) :] if logs.startswith(shown) else logs
        if new:
            on_log(new)
        shown = logs
        now = (str(made.get("status")), made.get("metrics") or {})
        if now != before:
            on_metrics(*now)
            before = now
        if made.get("status") in ENDED:
            break
        if timeout is not None and time.monotonic() - began > timeout:
            replicate.cancel(identifier, "trainings")
            raise CogpressError(f"Training {identifier} did not end within {timeout:g} s and was canceled.")
        replicate.pause(POLL_SECONDS)
        made = dict(replicate.ask("GET", f"/v1/trainings/{identifier}", what=f"training {identifier}"))
    if made["status"] != "succeeded":
        reason = str(made.get("error") or "it gives no reason")
        raise CogpressError(f"Training {identifier} {made['status']}: {redacted(reason, replicate.token)}")
    output = made.get("output") or {}
    output = output if isinstance(output, dict) else {"weights": output}
    return Trained(
        identifier,
        str(output.get("version") or ""),
        str(output.get("weights") or ""),
        made.get("metrics") or {},
        time.monotonic() - began,
    )


def weights(trained: Trained, cache: Path) -> fetch.FetchedModel:
    """Fetch a training's weights and check each file against their manifest.

    Raises:
        CogpressError: there are none, they can not be fetched, or a file is not the one that was trained.
    """
    if not trained.weights:
        raise CogpressError(f"Training {trained.id} tells no address of weights. Its version is {trained.version}.")
    found = fetch.model(trained.weights, cache)
    if found.manifest is None:
        raise CogpressError(
            f"The weights of training {trained.id} have no manifest to be checked against: they are not this kit's. "
            f"They are in {found.folder}."
        )
    return found


def tried(
    replicate: Replicate,
    wanted: TestTraining,
    root: Path,
    version: str,
    *,
    model: str,
    score: cases.Score,
    timeout: float,
    on_log: Callable[[str], None],
) -> tuple[Trained, list[cases.Outcome]]:
    """Train with a pushed version, and ask what came of it.

    Args:
        replicate: where.
        wanted: of `model.yaml`.
        root: the project's folder.
        version: the pushed version's id.
        model: owner/name that it belongs to, and that gets the trained version.
        score: tells whether an answer is the expected one.
        timeout: seconds that one prediction may take.
        on_log: is told each new part of the log.

    Raises:
        CogpressError: the training fails.
    """
    made = start(replicate, f"{model}:{version}", model, root / wanted.data, wanted.input)
    trained = follow(replicate, made, on_log, timeout=wanted.timeout)
    if not trained.version:
        raise CogpressError(f"Training {trained.id} succeeded and made no version of {model}.")
    identifier = trained.version.rpartition(":")[2]
    return trained, cases.run(replicate, identifier, wanted.tests, score, timeout=timeout, parallel=1)
