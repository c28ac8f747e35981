"""What the tests kill: each function is the work of a process, forked from one that has imported everything."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console

from cogpress import config, http
from cogpress.engines import transformers as reference
from cogpress.preflight import place
from cogpress.push import run as pushing
from cogpress.push.target import PushTarget
from cogpress.serve import batch
from cogpress.serve.model import ServedModel
from cogpress.weights import fetch, pget

QUIET = Console(quiet=True)
SERVE = config.Serve(engine="transformers")
reference.prepare(SERVE)


def fetching(url: str, cache: Path) -> None:
    pget.program = lambda: None
    http.BACKOFF = 0.001
    fetch.model(url, cache)


def answering(folder: Path, weights: Path) -> None:
    """Answer `in.jsonl`; `asked` gets a byte for each line that is."""
    torch.set_num_threads(1)
    settings = config.Config(serve=SERVE)

    def progress(_done: int, _failed: int, tokens: int) -> None:
        if tokens:
            with (folder / "asked").open("ab") as file:
                file.write(b".")

    batch.run(
        folder / "in.jsonl",
        folder / "out.jsonl",
        lambda: ServedModel(weights, settings, folder, concurrency=4),
        {"prompt": {"type": "string"}, "max_tokens": {"type": "integer"}},
        concurrency=4,
        made_by=batch.made_by(str(weights), settings, folder),
        progress=progress,
    )


def shipping(root: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    place.IMAGE_BYTES = 1000
    settings = config.load(root / "model.yaml")
    target = PushTarget.of(root, settings, "local/model", hardware="gpu-l40s")
    pushing.push(target, settings, QUIET)
