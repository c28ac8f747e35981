"""A deployment beside pushes: which of its settings a push changes, switching it off, and going back a version."""

from __future__ import annotations

from typing import Any

from cogpress.config import Config, Deployment
from cogpress.errors import CogpressError
from cogpress.replicate import routes
from cogpress.replicate.api import Replicate


def named(wanted: Deployment) -> dict[str, Any]:
    """The settings that model.yaml names; an update leaves the others as they are."""
    return wanted.model_dump(include=wanted.model_fields_set - {"name"})


def is_off(deployment: dict[str, Any]) -> bool:
    """Whether it may run no instance."""
    found = (deployment.get("current_release") or {}).get("configuration") or {}
    return bool(found.get("max_instances") == 0)


def disable(replicate: Replicate, settings: Config) -> str:
    """Switch the deployment off: no instance runs, none starts, and its predictions are refused. Returns its name.

    Raises:
        CogpressError: model.yaml names none, there is none, or Replicate refuses.
    """
    name, _ = _existing(replicate, settings)
    replicate.ask(routes.update_deployment(name, min_instances=0, max_instances=0))
    return name


def rollback(replicate: Replicate, settings: Config, version: str | None) -> tuple[str, str]:
    """Deploy an earlier version again; the deployment's other settings stay. Returns its name and the version.

    Args:
        replicate: the client.
        settings: of `model.yaml`.
        version: the id, or its beginning; None takes the one before the version that is deployed.

    Raises:
        CogpressError: there is no such version or no such deployment, or Replicate refuses.
    """
    name, release = _existing(replicate, settings)
    model, deployed = str(release.get("model")), str(release.get("version"))
    listed = [str(one["id"]) for one in replicate.ask(routes.versions(model))["results"]]
    if version is None:
        older = listed[listed.index(deployed) + 1 :] if deployed in listed else []
        if not older:
            raise CogpressError(
                f"{model} lists no version before {deployed[:12]}, which {name} runs. Name one: --rollback VERSION."
            )
        chosen = older[0]
    else:
        fitting = [one for one in listed if one.startswith(version)]
        if len(fitting) != 1:
            raise CogpressError(
                f"{len(fitting) or 'No'} versions of {model} begin with {version}. Copy the whole id from its page."
            )
        chosen = fitting[0]
    replicate.ask(routes.update_deployment(name, version=chosen))
    return name, chosen


def _existing(replicate: Replicate, settings: Config) -> tuple[str, dict[str, Any]]:
    wanted = settings.push.deployment
    if wanted is None:
        raise CogpressError("model.yaml names no push.deployment. Name the deployment there.")
    name = f"{replicate.ask(routes.account())['username']}/{wanted.name}"
    found = replicate.find(routes.deployment(name))
    if found is None:
        raise CogpressError(f"There is no deployment {name}. Correct push.deployment.name in model.yaml.")
    return name, found.get("current_release") or {}
