"""Models, their versions and deployments: what can be asked, by which names, and what answers.

Knows names and what lasts; leaves inputs to `versions` and running to `lane` and `backend`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress.errors import CogpressError
from cogpress.playground.backend import Backend, Cog, Rewrite, as_they_are
from cogpress.playground.queue import Lane
from cogpress.playground.servers import OnDemand, Servers
from cogpress.playground.versions import Deployment, Model, Version
from cogpress.weights import manifest

if TYPE_CHECKING:
    from cogpress.playground.predictions import Prediction
    from cogpress.playground.store import Store

OWNER = "local"
"""Who owns models that are named without an owner."""

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


class NotFound(CogpressError):
    """There is no such model, version or deployment."""


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
        self.training: set[str] = set()
        """Names in the folder of trained weights that trainings are making."""
        self.on_end: Callable[[Prediction], None] = lambda _prediction: None
        self._store, self._servers, self._root, self._rewrite, self._slots = store, servers, root, rewrite, slots
        self._lanes: dict[str, Lane] = {}
        self._ending: set[asyncio.Task[None]] = set()

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
        await asyncio.to_thread(self._remove_unused)

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
                # It is given again, so it is the one that is meant now, by the name that it has now.
                model.versions.remove(known)
                version = replace(known, label=label or known.label, verified=verified)
                break
        else:
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
        """Forget a version; its predictions stay. Weights that a training made go when nothing asks them any more."""
        self.models[version.model].versions.remove(version)
        self._store.write("DELETE FROM versions WHERE id = ? AND model = ?", version.id, version.model)
        task = asyncio.get_running_loop().create_task(self._let_go(version.source))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def _let_go(self, source: str) -> None:
        """End what runs for a source that no version has any more, when its last prediction has ended."""
        lane = self._lanes.get(source)
        if lane is not None:
            await lane.idle()
        if source in self._sources():
            return
        if lane is not None and self._lanes.pop(source, None) is not None:
            await lane.close()
        await asyncio.to_thread(self._remove_unused)

    def _sources(self) -> set[str]:
        return {version.source for model in self.models.values() for version in model.versions}

    def _remove_unused(self) -> None:
        """Remove weights that trainings made for versions that were deleted, and what a killed training left."""
        # By name, so that a data folder that was moved loses nothing.
        used = {Path(source).name for source in self._sources() if source.startswith("folder:")} | self.training
        for entry in (self._store.folder / "trained").glob("*"):
            if entry.name.partition(".")[0] in used:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)

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
                return self.deployed(self.deployments[full])
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

    def deployed(self, deployment: Deployment) -> Version:
        """The version that a deployment stands for.

        Raises:
            NotFound: it is not served any more.
        """
        try:
            return self.version(deployment.model, deployment.version)
        except NotFound:
            raise NotFound(
                f"The deployment {deployment.full_name} stands for a version of {deployment.model} that was deleted "
                f"({deployment.version[:12]}). Change it to one that GET /v1/models/{deployment.model}/versions lists."
            ) from None

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
            from cogpress.playground.remote import Remote

            return Remote(source.removeprefix("replicate:"))
        if source.startswith("folder:"):
            weights = source.removeprefix("folder:") or None
            name = f"server-{hashlib.sha256(source.encode()).hexdigest()[:8]}"
            return OnDemand(self._servers, self._root, weights, name, port=port, rewrite=self._rewrite)
        raise CogpressError(f"{source!r} is neither a URL, replicate:owner/name nor folder:PATH.")

    async def close(self) -> None:
        """End everything that runs."""
        for task in list(self._ending):
            task.cancel()
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))
        await self._servers.close()


def _look_at(source: str) -> tuple[str | None, str | None]:
    """Whether a folder's weights are verified, and what tells them from others."""
    folder = Path(source.removeprefix("folder:"))
    if not source.startswith("folder:/") or not (folder / manifest.NAME).is_file():
        return None, None
    facts = manifest.read(folder)
    return manifest.state(folder, facts), manifest.fingerprint(folder)


__all__ = ["NAME", "OWNER", "Catalog", "Deployment", "Model", "NotFound", "Version"]
