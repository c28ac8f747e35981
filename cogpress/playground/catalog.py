"""The models and versions that can be asked, by name, and the queue of each version's source."""

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

from cogpress.errors import CogpressError
from cogpress.playground.background import Background
from cogpress.playground.queue import Queue
from cogpress.playground.records import HostedModel, Prediction, Version
from cogpress.playground.sources import Sources
from cogpress.playground.store import Store
from cogpress.weights import manifest

OWNER = "local"
"""The owner of models that are named without one."""

TRAINED = "trained"
"""The folder of trained weights beside the store."""

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


class NotFound(CogpressError):
    """There is no such model or version."""


def full_name(name: str) -> str:
    """`owner/name` of a model named with or without its owner.

    Raises:
        CogpressError: it is not a valid name.
    """
    owner, _, short = name.rpartition("/")
    full = f"{owner or OWNER}/{short}"
    if not all(map(NAME.fullmatch, full.split("/", 1))):
        raise CogpressError(
            f"{full[:100]!r} is not a valid model name. Use letters, digits, dots, dashes and underscores."
        )
    return full


class Catalog:
    """All models and versions, kept in the store."""

    def __init__(self, store: Store, sources: Sources) -> None:
        """Empty until `load`.

        Args:
            store: where models and versions are kept.
            sources: opens what runs a version.
        """
        self.models: dict[str, HostedModel] = {}
        self.training: set[str] = set()
        """Names in the folder of trained weights that trainings are writing."""
        self.on_end: Callable[[Prediction], None] = lambda _prediction: None
        """Called with each prediction that has ended."""
        self._store, self._sources = store, sources
        self._queues: dict[str, Queue] = {}
        self._removals = Background()

    async def load(self) -> None:
        """Read the store."""
        for row in await self._store.read("SELECT * FROM models ORDER BY created"):
            owner, _, name = row["name"].partition("/")
            self.models[row["name"]] = HostedModel(owner, name, row["created"])
        for row in await self._store.read("SELECT * FROM versions ORDER BY created"):
            if row["model"] in self.models:
                version = Version(row["id"], row["model"], row["created"], **json.loads(row["data"]))
                self.models[row["model"]].versions.append(version)
        await self._remove_unused()

    def add_model(self, name: str) -> HostedModel:
        """The model of this name, created if there is none.

        Raises:
            CogpressError: it is not a valid name.
        """
        full = full_name(name)
        if full not in self.models:
            owner, _, short = full.partition("/")
            self.models[full] = model = HostedModel(owner, short)
            self._store.write("INSERT OR REPLACE INTO models VALUES (?, ?, '{}')", full, model.created)
        return self.models[full]

    async def add(self, name: str, source: str, *, label: str = "") -> Version:
        """Add a version to a model, which is created if there is none; adding the same version again changes its label.

        Args:
            name: of the model, with or without its owner.
            source: see `Version.source`.
            label: how people tell it from other versions.

        Raises:
            CogpressError: the name is not valid, or the source has no schema.
        """
        model = self.add_model(name)
        document = await self._queue(source).backend.schema()
        verified, fingerprint = await asyncio.to_thread(_inspect, source)
        identity = json.dumps([source, fingerprint, document], sort_keys=True)
        identifier = hashlib.sha256(identity.encode()).hexdigest()
        for known in model.versions:
            if known.id == identifier:
                # What is added last is the latest version.
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

    def remove_version(self, version: Version) -> None:
        """Remove a version, keeping its predictions. Weights that a training made for it go once nothing uses them."""
        self.models[version.model].versions.remove(version)
        self._store.write("DELETE FROM versions WHERE id = ? AND model = ?", version.id, version.model)
        folder = Path(version.source.removeprefix("folder:"))
        if version.source.startswith("folder:") and folder.parent.name == TRAINED:
            self._store.write("INSERT OR IGNORE INTO removed VALUES (?)", folder.name)
        self._removals.start(self._release(version.source))

    async def _release(self, source: str) -> None:
        """Close the backend of a source that no version has any more, once its last prediction has ended."""
        queue = self._queues.get(source)
        if queue is not None:
            await queue.idle()
        if source in self._used():
            return
        if queue is not None and self._queues.pop(source, None) is not None:
            await queue.close()
        await self._remove_unused()

    def _used(self) -> set[str]:
        return {version.source for model in self.models.values() for version in model.versions}

    async def _remove_unused(self) -> None:
        """Remove trained weights of deleted versions, and what a killed training left behind.

        Only what the store records as such: a store that was begun afresh knows nothing of the weights beside it.
        """
        rows = await self._store.read(
            "SELECT name FROM removed UNION SELECT id FROM trainings WHERE status IN ('failed', 'canceled')"
        )
        await asyncio.to_thread(self._remove, {row["name"] for row in rows})

    def _remove(self, names: set[str]) -> None:
        # By name, so that moving the data folder loses nothing.
        used = {Path(source).name for source in self._used() if source.startswith("folder:")} | self.training
        for entry in (self._store.folder / TRAINED).glob("*"):
            name = entry.name.partition(".")[0]
            if name in used or name not in names:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)

    def model(self, name: str) -> HostedModel:
        """A model by `owner/name`.

        Raises:
            NotFound: there is none.
        """
        if name not in self.models:
            raise NotFound(f"There is no model {name[:100]}. GET /v1/models lists them.")
        return self.models[name]

    def resolve(self, reference: str) -> Version:
        """The version meant by a version's id, `owner/name`, `owner/name:version` or `name`.

        Raises:
            NotFound: there is none.
        """
        if ":" in reference:  # also with nothing after it: whoever lost the version does not mean the newest
            name, _, identifier = reference.rpartition(":")
            return self.version(name, identifier)
        for full in (reference, f"{OWNER}/{reference}"):
            if full in self.models:
                return self.latest(self.models[full])
        for model in self.models.values():
            for version in model.versions:
                if version.id == reference:
                    return version
        raise NotFound(f"There is no model or version {reference[:100]!r}. GET /v1/models lists them.")

    def latest(self, model: HostedModel) -> Version:
        """A model's newest version.

        Raises:
            NotFound: it has none.
        """
        if not model.versions:
            raise NotFound(f"The model {model.full_name} has no version yet. Train one, or add it with --model.")
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

    def streams(self, model: str, version: str) -> bool:
        """Whether the output of a prediction's version can be read while it runs."""
        try:
            return self.version(model, version).streams
        except NotFound:
            return False

    def queue(self, version: Version) -> Queue:
        """The queue of a version's predictions.

        Raises:
            CogpressError: its source cannot be opened.
        """
        return self._queue(version.source)

    def _queue(self, source: str) -> Queue:
        if source not in self._queues:
            self._queues[source] = Queue(self._sources.open(source), lambda prediction: self.on_end(prediction))
        return self._queues[source]

    async def close(self) -> None:
        """Fail what waits or runs, and close every backend."""
        await self._removals.close()
        await asyncio.gather(*(queue.close() for queue in self._queues.values()))


def _inspect(source: str) -> tuple[str | None, str | None]:
    """Whether a folder's weights are verified, and their fingerprint."""
    folder = Path(source.removeprefix("folder:"))
    if not source.startswith("folder:/") or not (folder / manifest.NAME).is_file():
        return None, None
    facts = manifest.read(folder)
    return manifest.state(folder, facts), manifest.fingerprint(folder)
