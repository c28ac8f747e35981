"""Replicate's HTTP API as data: one function a request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from cogpress.config import Deployment


@dataclass(frozen=True)
class Call:
    """A request.

    Attributes:
        method: of HTTP.
        route: after the API's address.
        what: the thing asked for, in messages.
        body: sent as JSON.
        idempotent: whether the request may reach Replicate twice; None leaves it to the method.
        more: settings for httpx.
        paced: it counts against the account's rate limit for creations.
    """

    method: str
    route: str
    what: str
    body: Any = None
    idempotent: bool | None = None
    more: dict[str, Any] = field(default_factory=dict)
    paced: bool = False


def account() -> Call:
    """The token's account: `username`, `name`, `type`."""
    return Call("GET", "/v1/account", "the account")


def hardware() -> Call:
    """A list of `name` and `sku`."""
    return Call("GET", "/v1/hardware", "the hardware")


def model(name: str) -> Call:
    """A model by owner/name, with its `latest_version`."""
    return Call("GET", f"/v1/models/{name}", f"model {name}")


def create_model(name: str, visibility: str, sku: str) -> Call:
    """A new model; 409 where it exists."""
    owner, _, short = name.partition("/")
    body = {"owner": owner, "name": short, "visibility": visibility, "hardware": sku}
    # A second try after a lost answer finds the model there, and 409 says so.
    return Call("POST", "/v1/models", f"a new model {name}", body, idempotent=True)


def update_model(name: str, **texts: str) -> Call:
    """A change of a model's page: `readme`, `description`; not its visibility, its cover or its example."""
    return Call("PATCH", f"/v1/models/{name}", f"a change of {name}'s page", texts, idempotent=True)


def versions(name: str) -> Call:
    """A page of a model's versions in `results`, the newest first."""
    return Call("GET", f"/v1/models/{name}/versions", f"the versions of {name}")


def version(name: str, identifier: str) -> Call:
    """A version, with its `openapi_schema`."""
    return Call("GET", f"/v1/models/{name}/versions/{identifier}", f"version {identifier[:12]} of {name}")


def delete_version(name: str, identifier: str) -> Call:
    """Delete a version of a private model; it goes some time after the answer."""
    return Call("DELETE", f"/v1/models/{name}/versions/{identifier}", f"the end of version {identifier[:12]} of {name}")


def predict(
    version: str, inputs: dict[str, Any], *, idempotent: bool | None = None, cancel_after: float | None = None
) -> Call:
    """A new prediction of a version; `idempotent` where a second one would do no harm.

    With `cancel_after`, Replicate ends it after that many seconds, 5 or more, whatever becomes of who asked.
    """
    body = {"version": version, "input": inputs, "stream": True}
    headers = {} if cancel_after is None else {"headers": {"Cancel-After": f"{max(5, math.ceil(cancel_after))}s"}}
    what = f"a prediction of version {version[:12]}"
    return Call("POST", "/v1/predictions", what, body, idempotent, headers, paced=True)


def predict_by_name(kind: Literal["models", "deployments"], name: str, inputs: dict[str, Any]) -> Call:
    """A new prediction of a deployment, or of an official model; other models answer 404 and need their version."""
    body = {"input": inputs, "stream": True}
    return Call("POST", f"/v1/{kind}/{name}/predictions", f"a prediction of {name}", body)


def prediction(identifier: str) -> Call:
    """A prediction as it is now."""
    return Call("GET", f"/v1/predictions/{identifier}", f"prediction {identifier}")


def cancel(identifier: str, kind: Literal["predictions", "trainings"] = "predictions") -> Call:
    """Cancel a prediction or a training; twice does no harm."""
    route = f"/v1/{kind}/{identifier}/cancel"
    return Call("POST", route, f"the cancellation of {identifier}", idempotent=True)


def train(model: str, version: str, destination: str, inputs: dict[str, Any]) -> Call:
    """A new training with a version of a model. It costs money, so it is never started twice."""
    body = {"destination": destination, "input": inputs}
    route = f"/v1/models/{model}/versions/{version}/trainings"
    return Call("POST", route, f"a training of {model}", body)


def training(identifier: str) -> Call:
    """A training as it is now."""
    return Call("GET", f"/v1/trainings/{identifier}", f"training {identifier}")


def deployment(name: str) -> Call:
    """A deployment by owner/name, with its `current_release`."""
    return Call("GET", f"/v1/deployments/{name}", f"deployment {name}")


def create_deployment(wanted: Deployment, model: str, version: str, sku: str) -> Call:
    """A new deployment of a model's version."""
    body: dict[str, Any] = {"name": wanted.name, "model": model, "version": version}
    body |= {"hardware": wanted.hardware or sku, "min_instances": wanted.min_instances}
    body["max_instances"] = wanted.max_instances
    return Call("POST", "/v1/deployments", f"a new deployment {wanted.name}", body)


def update_deployment(name: str, **changes: Any) -> Call:
    """A change of the deployment owner/name; what is not named stays. The same change twice does no harm."""
    return Call("PATCH", f"/v1/deployments/{name}", f"a change of deployment {name}", changes, idempotent=True)


def upload(name: str, content: bytes) -> Call:
    """A new file, which Replicate's own models read at its `urls.get`."""
    files = {"content": (name, content, "application/octet-stream")}
    more = {"files": files, "timeout": 300}
    return Call("POST", "/v1/files", f"the upload of {name}", idempotent=True, more=more)
