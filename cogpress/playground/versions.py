"""What can be asked: versions with their schemas, models, and deployments, which are other names for versions.

Knows a schema and checks inputs against it; leaves names, lasting and running to `catalog`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jsonschema

from cogpress.playground.predictions import InvalidInput


@dataclass(frozen=True, eq=False)
class Version:
    """One version of a model: what its inputs are, and where it runs."""

    id: str
    model: str
    created: float
    schema: dict[str, Any]
    source: str
    """`http(s)://…` a Cog server, `replicate:owner/name[:version]`, or `folder:PATH` of weights ("" for the
    project's own)."""
    label: str = ""
    verified: str | None = None

    @property
    def cog_version(self) -> str:
        """Of the Cog that made it, as far as its document tells."""
        return str(self.schema.get("info", {}).get("version", "unknown"))

    @cached_property
    def iterator(self) -> bool:
        """Whether its output is a list that grows."""
        return self._schemas.get("Output", {}).get("x-cog-array-type") == "iterator"

    @cached_property
    def streams(self) -> bool:
        """Whether it can be followed while it runs."""
        if self.source.startswith("replicate:"):
            return self.iterator
        return bool(self.schema.get("paths", {}).get("/predictions", {}).get("post", {}).get("x-cog-streaming"))

    @cached_property
    def secrets(self) -> frozenset[str]:
        """The names of inputs that must not be shown."""
        properties = self._schemas.get("Input", {}).get("properties", {})
        return frozenset(
            name for name, one in properties.items() if one.get("x-cog-secret") or one.get("format") == "password"
        )

    @property
    def _schemas(self) -> dict[str, Any]:
        return self.schema.get("components", {}).get("schemas", {})

    def check(self, inputs: dict[str, Any]) -> None:
        """Check a prediction's input.

        Raises:
            InvalidInput: with each input that is wrong.
        """
        self._check(self._validator, inputs)

    def check_training(self, inputs: dict[str, Any]) -> None:
        """Check a training's input; raises as `check` does."""
        self._check(self._training_validator, inputs)

    @cached_property
    def _validator(self) -> jsonschema.Draft7Validator:
        return self._made("Input")

    @cached_property
    def _training_validator(self) -> jsonschema.Draft7Validator:
        return self._made("TrainingInput")

    def _made(self, name: str) -> jsonschema.Draft7Validator:
        components = {"schemas": {name: {}, **self._schemas}}
        return jsonschema.Draft7Validator({"$ref": f"#/components/schemas/{name}", "components": components})

    def _check(self, validator: jsonschema.Draft7Validator, inputs: dict[str, Any]) -> None:
        wrong = []
        for error in validator.iter_errors(inputs):
            name = str(error.absolute_path[0]) if error.absolute_path else "input"
            if error.validator == "required":
                missing = [one for one in error.validator_value if one not in inputs]
                wrong += [(one, f"{one} is required") for one in missing if (one, f"{one} is required") not in wrong]
            else:
                wrong.append((name, "is not as described" if name in self.secrets else _shortened(error.message)))
        if wrong:
            raise InvalidInput(wrong)


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:200]} … {text[-80:]}"


@dataclass
class Model:
    """A model with its versions, the newest last."""

    owner: str
    name: str
    created: float = field(default_factory=time.time)
    facts: dict[str, Any] = field(default_factory=dict)
    """description, visibility, hardware, and addresses, as Replicate names them."""
    versions: list[Version] = field(default_factory=list)

    @property
    def full_name(self) -> str:
        """owner/name."""
        return f"{self.owner}/{self.name}"


@dataclass
class Deployment:
    """A name that stands for one version until it is changed."""

    owner: str
    name: str
    model: str
    version: str
    created: float
    release: int = 1
    hardware: str = "cpu"
    min_instances: int = 0
    max_instances: int = 1

    @property
    def full_name(self) -> str:
        """owner/name."""
        return f"{self.owner}/{self.name}"
