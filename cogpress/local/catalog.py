"""Models, their versions and deployments: what can be asked, by which names, and what answers.

Knows names and schemas and checks inputs against them; leaves running to `lane` and `backend`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema

from cogpress import manifest, verdict
from cogpress.errors import CogpressError
from cogpress.local.backend import Backend, Cog, Rewrite, as_they_are
from cogpress.local.lane import Lane
from cogpress.local.predictions import InvalidInput
from cogpress.local.servers import OnDemand, Servers

if TYPE_CHECKING:
    from cogpress.local.predictions import Prediction
    from cogpress.local.store import Store

OWNER = "local"
"""Who owns models that are named without an owner."""

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


class NotFound(CogpressError):
    """There is no such model, version or deployment."""


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


class Catalog:
    """All models, versions and deployments, kept in the store."""

    def __init__(
        self, store: Store, servers: Servers, root: Path, *, rewrite: Rewrite = as_they_are, slots: int | None = None
    ) -> None:
        """Made empty; see `load`.

        Args:
            store: where they last.
            servers: for versions that are folders of weights.
            root: the project's folder, whose runner serves them.
            rewrite: for files among inputs.
            slots: how many predictions a Cog server given by address runs at once, where known.
        """
        self.models: dict[str, Model] = {}
        self.deployments: dict[str, Deployment] = {}
        self.on_end: Callable[[Prediction], None] = lambda _prediction: None
        self._store, self._servers, self._root, self._rewrite, self._slots = store, servers, root, rewrite, slots
        self._lanes: dict[str, Lane] = {}

    async def load(self) -> None:
        """Read what the store holds."""
        for row in await self._store.read("SELECT * FROM models ORDER BY created"):
            owner, _, name = row["name"].partition("/")
            self.models[row["name"]] = Model(owner, name, row["created"], json.loads(row["data"]))
        for row in await self._store.read("SELECT * FROM versions ORDER BY created"):
            if row["model"] in self.models:
                version = Version(row["id"], row["model"], row["created"], **json.loads(row["data"]))
                self.models[row["model"]].versions.append(version)
        for row in await self._store.read("SELECT * FROM deployments ORDER BY created"):
            self.deployments[row["name"]] = Deployment(**json.loads(row["data"]))

    async def add(self, name: str, source: str, *, label: str = "", port: int = 0) -> Version:
        """A version of a model, which is made where it does not exist; the same one twice is one.

        Args:
            name: of the model, with or without an owner.
            source: see `Version.source`.
            label: what people see of it.
            port: for its server, where it is a folder.

        Raises:
            CogpressError: the name is none, or what is there has no schema.
        """
        owner, _, short = name.rpartition("/")
        model = self.model_or_new(owner or OWNER, short)
        lane = self.lane_of(source, port=port)
        document = await lane.backend.schema()
        verified, print_ = await asyncio.to_thread(_look_at, source)
        identity = json.dumps([source, print_, document], sort_keys=True)
        identifier = hashlib.sha256(identity.encode()).hexdigest()
        for known in model.versions:
            if known.id == identifier:
                # It is given again, so it is the one that is meant now.
                model.versions.remove(known)
                model.versions.append(known)
                return known
        version = Version(identifier, model.full_name, time.time(), document, source, label, verified)
        model.versions.append(version)
        data = {name: getattr(version, name) for name in ("schema", "source", "label", "verified")}
        await self._store.write(
            "INSERT OR REPLACE INTO versions VALUES (?, ?, ?, ?)",
            *(version.id, version.model, version.created, json.dumps(data)),
        )
        return version

    def model_or_new(self, owner: str, name: str, facts: dict[str, Any] | None = None) -> Model:
        """A model by name, made where there is none.

        Raises:
            CogpressError: it is no name for a model.
        """
        full = f"{owner}/{name}"
        if full not in self.models:
            if not (NAME.fullmatch(owner) and NAME.fullmatch(name)):
                raise CogpressError(f"{full!r} is no name for a model. Use letters, digits, dots, dashes, underscores.")
            self.models[full] = Model(owner, name, facts=facts or {})
            self.save_model(self.models[full])
        return self.models[full]

    def save_model(self, model: Model) -> None:
        """Write a model down."""
        row = (model.full_name, model.created, json.dumps(model.facts))
        self._store.write("INSERT OR REPLACE INTO models VALUES (?, ?, ?)", *row)

    def remove_model(self, model: Model) -> None:
        """Forget a model that has no versions."""
        del self.models[model.full_name]
        self._store.write("DELETE FROM models WHERE name = ?", model.full_name)

    def remove_version(self, version: Version) -> None:
        """Forget a version; its predictions stay."""
        self.models[version.model].versions.remove(version)
        self._store.write("DELETE FROM versions WHERE id = ? AND model = ?", version.id, version.model)

    def save_deployment(self, deployment: Deployment) -> None:
        """Make or change a deployment."""
        name = deployment.full_name
        self.deployments[name] = deployment
        self._store.write(
            "INSERT OR REPLACE INTO deployments VALUES (?, ?, ?)",
            name,
            deployment.created,
            json.dumps(vars(deployment)),
        )

    def remove_deployment(self, deployment: Deployment) -> None:
        """Forget a deployment."""
        del self.deployments[deployment.full_name]
        self._store.write("DELETE FROM deployments WHERE name = ?", deployment.full_name)

    def resolve(self, reference: str) -> Version:
        """What a reference means: a version's id, `owner/name`, `owner/name:version`, `name`, or a deployment's name.

        Raises:
            NotFound: nothing.
        """
        name, _, identifier = reference.rpartition(":") if ":" in reference else (reference, "", "")
        if identifier:
            return self.version(name, identifier)
        for full in (name, f"{OWNER}/{name}"):
            if full in self.models:
                return self.latest(self.models[full])
            if full in self.deployments:
                deployment = self.deployments[full]
                return self.version(deployment.model, deployment.version)
        for model in self.models.values():
            for version in model.versions:
                if version.id == reference:
                    return version
        raise NotFound(f"There is no model, version or deployment {reference[:100]!r}. GET /v1/models lists them.")

    def latest(self, model: Model) -> Version:
        """A model's newest version.

        Raises:
            NotFound: it has none.
        """
        if not model.versions:
            raise NotFound(f"The model {model.full_name} has no version yet. Train one, or give it with --model.")
        return model.versions[-1]

    def version(self, model: str, identifier: str) -> Version:
        """A version of a model by its id.

        Raises:
            NotFound: there is none.
        """
        for version in self.models[model].versions if model in self.models else ():
            if version.id == identifier:
                return version
        raise NotFound(f"There is no version {identifier[:80]!r} of {model[:100]}.")

    def deployment(self, owner: str, name: str) -> Deployment:
        """A deployment by its name.

        Raises:
            NotFound: there is none.
        """
        found = self.deployments.get(f"{owner}/{name}")
        if found is None:
            raise NotFound(f"There is no deployment {owner[:60]}/{name[:60]}. GET /v1/deployments lists them.")
        return found

    def streams(self, model: str, version: str) -> bool:
        """Whether a version, of which a prediction is known, can be followed while it runs."""
        try:
            return self.version(model, version).streams
        except NotFound:
            return False

    def lane(self, version: Version) -> Lane:
        """The queue in which a version's predictions wait."""
        return self.lane_of(version.source)

    def lane_of(self, source: str, port: int = 0) -> Lane:
        """The queue before what a source names.

        Raises:
            CogpressError: it names nothing.
        """
        if source not in self._lanes:
            self._lanes[source] = Lane(self._backend(source, port), lambda prediction: self.on_end(prediction))
        return self._lanes[source]

    async def warm(self, version: Version) -> None:
        """Start a version's server, where it is one of ours.

        Raises:
            CogpressError: it does not get ready.
        """
        backend = self.lane(version).backend
        if isinstance(backend, OnDemand):
            await self._servers.enter(backend)

    def _backend(self, source: str, port: int) -> Backend:
        if source.startswith(("http://", "https://")):
            return Cog(source, self._slots, self._rewrite)
        if source.startswith("replicate:"):
            from cogpress.local.remote import Remote

            return Remote(source.removeprefix("replicate:"))
        if source.startswith("folder:"):
            weights = source.removeprefix("folder:") or None
            name = f"server-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
            return OnDemand(self._servers, self._root, weights, name, port=port, rewrite=self._rewrite)
        raise CogpressError(f"{source!r} is neither a URL, replicate:owner/name nor folder:PATH.")

    async def close(self) -> None:
        """End everything that runs."""
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))
        await self._servers.close()


def _look_at(source: str) -> tuple[str | None, str | None]:
    """Whether a folder's weights are verified, and what tells them from others."""
    folder = Path(source.removeprefix("folder:"))
    if not source.startswith("folder:/") or not (folder / manifest.NAME).is_file():
        return None, None
    facts = manifest.read(folder)
    return verdict.state(folder, facts), manifest.fingerprint(folder)
