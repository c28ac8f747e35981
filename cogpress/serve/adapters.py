"""Several adapters over one base: from the names in `model.yaml` to adapters that an engine serves.

The shared base is the dequantized one that they were trained on, so that each answers as training scored it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cogpress import config, source
from cogpress.engines.base import Adapter
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.merge import adapter, merge
from cogpress.merge.adapter import LoraAdapter
from cogpress.weights import fetch, manifest


@dataclass(frozen=True)
class ReadyAdapter:
    """An adapter that is fetched and checked, and its prompt template."""

    adapter: Adapter
    prompt: config.Prompt


def read(name: str, folder: Path) -> LoraAdapter:
    """Read an adapter that can be served without merging it.

    Args:
        name: its name in messages.
        folder: where it is.

    Raises:
        CogpressError: cogpress did not make it, or engines cannot apply all that it changes.
    """
    found = adapter.read(folder)
    wrong = sorted(found.replaced.keys() | found.tokens.keys())
    wrong += [module for module, layer in found.layers.items() if layer.embedding or layer.magnitude or layer.bias]
    if wrong:
        raise CogpressError(
            f"The adapter {name} changes {wrong[0]} in a way that only a merge applies (DoRA, embeddings, biases or "
            "whole modules). Merge it with scripts/merge and serve the weights."
        )
    return found


def rank(found: LoraAdapter) -> int:
    """The largest rank of an adapter's matrices."""
    settings = read_json(found.folder / "adapter_config.json")
    return max([int(settings["r"]), *map(int, (settings.get("rank_pattern") or {}).values())])


class Adapters:
    """The adapters of one server."""

    def __init__(self, sources: Mapping[str, str], settings: config.Config, root: Path) -> None:
        """Fetches nothing yet.

        Args:
            sources: the source of each adapter, by name; a path is relative to `root`.
            settings: the project's configuration.
            root: the project's folder.
        """
        self._sources = {name: source.under(place, root) for name, place in sources.items()}
        self._settings = settings
        self._root = root
        self._cache = root / ".cache"
        self._ready: dict[str, ReadyAdapter] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self.key = ""
        """The `base_key` that all adapters must have."""
        self.rank = 0
        """The largest rank that the engine makes room for."""

    def weights(self, wanted: str | os.PathLike[str] | None) -> str:
        """The source of the shared base; it is made if it does not exist yet.

        Args:
            wanted: a source that the user named; None for `root/weights` or, if that holds other weights, a folder in
                the cache.

        Raises:
            CogpressError: the adapters were trained on another base than model.yaml's.
        """
        first = next(iter(self._sources))
        trained = read(first, fetch.adapter(self._sources[first], self._cache).folder)
        self.key = trained.base_key
        ranks = [rank(trained), self._settings.train.rank]
        for place in self._sources.values():
            settings = Path(place) / "adapter_config.json"
            if settings.is_file():
                ranks.append(int(read_json(settings).get("r", 0)))
        self.rank = max(ranks)
        if wanted is not None:
            return os.fspath(wanted)
        folder = self._root / "weights"
        if folder.is_dir() and (manifest.read(folder) or {}).get("shared_base") == self.key:
            return str(folder)
        target = self._cache / "shared" / self.key[:16]
        if not (target / manifest.NAME).is_file():
            print("Making the base that the adapters share (only once).", flush=True)
            base_folder = fetch.base(self._settings.base.source, self._cache)
            merge.write_base(base_folder, trained.folder, target)
        return str(target)

    def check(self, found: fetch.FetchedModel) -> None:
        """Refuse weights that are not the adapters' base.

        Raises:
            CogpressError: they are not.
        """
        if (found.manifest or {}).get("shared_base") != self.key:
            raise CogpressError(
                f"{found.folder} is not the base that the adapters were trained on, dequantized. Make it with "
                "scripts/merge --base-alone, or name no weights."
            )

    async def get(self, name: str) -> ReadyAdapter:
        """An adapter by name, fetched and checked on first use.

        Raises:
            CogpressError: there is no such adapter, it is not available, or it belongs to another base.
        """
        if name not in self._sources:
            known = ", ".join(self._sources) or "none: model.yaml lists no adapters"
            raise CogpressError(f"There is no adapter {name!r}. The adapters are {known}.")
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name not in self._ready:
                self._ready[name] = await asyncio.to_thread(self._load, name)
        return self._ready[name]

    def _load(self, name: str) -> ReadyAdapter:
        folder = fetch.adapter(self._sources[name], self._cache).folder
        found = read(name, folder)
        if found.base_key != self.key:
            raise CogpressError(
                f"The adapter {name} was trained on another base than the others, or with another quantization. "
                "Serve it by itself."
            )
        largest = rank(found)
        if largest > self.rank:
            raise CogpressError(
                f"The adapter {name} has the rank {largest}, and the server has room for {self.rank}. Raise train.rank "
                "in model.yaml to it."
            )
        number = 1 + list(self._sources).index(name)
        return ReadyAdapter(Adapter(name, number, folder, largest), config.Prompt.model_validate(found.facts["prompt"]))
