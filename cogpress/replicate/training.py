"""Train on Replicate: upload the examples, start the training, follow its log to the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogpress.errors import CogpressError
from cogpress.redact import redacted
from cogpress.replicate import routes
from cogpress.replicate.api import ENDED, Replicate

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Trained:
    """A training that succeeded.

    Attributes:
        id: of the training.
        version: `owner/name:id` of the new version; empty where it made none.
        weights: their URL; empty where it gives none.
        metrics: of the training.
        seconds: its duration.
    """

    id: str
    version: str
    weights: str
    metrics: dict[str, Any]
    seconds: float


def trainer(replicate: Replicate, name: str) -> tuple[str, str, dict[str, Any]]:
    """The model, version and OpenAPI document that `owner/name` or `owner/name:version` names.

    Raises:
        CogpressError: there is no such version, or it cannot train.
    """
    model, _, version = name.partition(":")
    found = (
        replicate.find(routes.version(model, version))
        if version
        else (replicate.find(routes.model(model)) or {}).get("latest_version")
    )
    if not found:
        raise CogpressError(f"Replicate has no version {name} to train with. Push one with scripts/push {model}.")
    document = found.get("openapi_schema") or {}
    if "TrainingInput" not in document.get("components", {}).get("schemas", {}):
        raise CogpressError(f"{name} cannot train: its cog.yaml has no `train:`. Push a version that has one.")
    return model, str(found["id"]), document


def start(
    replicate: Replicate, name: str, destination: str, data: Path, inputs: Mapping[str, Any], sku: Callable[[], str]
) -> dict[str, Any]:
    """Upload the examples and start a training.

    Args:
        replicate: the client.
        name: the trainer; see `trainer`.
        destination: owner/name of the model that gets the new version; created, private, where it does not exist.
        data: the file of examples.
        inputs: the training's other inputs; those that are None are left out.
        sku: chooses the hardware of a destination that is created. The training runs on the trainer's.

    Raises:
        CogpressError: the file cannot be read, Replicate refuses, or no hardware can be chosen.
    """
    model, version, document = trainer(replicate, name)
    given = {key: value for key, value in inputs.items() if value is not None}
    known = document["components"]["schemas"]["TrainingInput"].get("properties", {})
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        raise CogpressError(f"The training of {name} has no input {unknown[0]}. Push a version that has it.")
    if not data.is_file():
        raise CogpressError(
            f"{data} does not exist. Name the examples with --train-data, or as data.train in model.yaml."
        )
    if replicate.find(routes.model(destination)) is None:
        replicate.make_model(destination, "private", sku())
    uploaded = {**given, "train_data": replicate.upload(data)}
    return dict(replicate.ask(routes.train(model, version, destination, uploaded)))


def follow(
    replicate: Replicate,
    made: dict[str, Any],
    on_log: Callable[[str], None],
    on_metrics: Callable[[str, dict[str, Any]], None] = lambda _status, _metrics: None,
    timeout: float | None = None,
) -> Trained:
    """Follow a training to its end.

    Args:
        replicate: the client.
        made: the training, as `start` returned it.
        on_log: called with each new part of the log, in whole lines.
        on_metrics: called with the status and the metrics after each change.
        timeout: seconds before it is canceled; None never cancels.

    Raises:
        CogpressError: it fails, is canceled, or times out.
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
            replicate.ask(routes.cancel(identifier, "trainings"))
            raise CogpressError(f"Training {identifier} did not end within {timeout:g} s and was canceled.")
        time.sleep(POLL_SECONDS)
        made = dict(replicate.ask(routes.training(identifier)))
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
