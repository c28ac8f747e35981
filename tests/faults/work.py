"""What the tests kill: each function is the work of a process, forked from one that has imported `MODULES`."""

from __future__ import annotations

import os
from pathlib import Path

MODULES = [
    "torch",
    "peft",
    "transformers.models.auto.modeling_auto",
    "cogpress.remake",
    "cogpress.train.loop",
    "cogpress.push.run",
    "cogpress.serve.batch",
    "cogpress.serve.model",
]


def fetching(url: str, cache: Path) -> None:
    from cogpress import http
    from cogpress.weights import fetch, pget

    pget.program = lambda: None
    http.BACKOFF = 0.001
    fetch.model(url, cache)


def answering(folder: Path, weights: Path) -> None:
    """Answer `in.jsonl`; `asked` gets a byte for each line that is."""
    import torch

    from cogpress import config
    from cogpress.engines import transformers as reference
    from cogpress.serve import batch
    from cogpress.serve.model import ServedModel

    torch.set_num_threads(1)
    settings = config.Config(serve=config.Serve(engine="transformers"))
    reference.prepare(settings.serve)

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


def training(run: Path, base_folder: Path, examples: Path) -> None:
    """Train, merge and draft, or go on with it."""
    import torch
    from rich.console import Console

    from cogpress import config, pipeline
    from cogpress.weights import base

    torch.set_num_threads(1)
    base.compute_dtype = lambda: torch.float32  # it is measured, and another moment may find another one faster
    given = {
        "base": {"source": str(base_folder)},
        "data": {"train": str(examples), "validation_share": 0.0},
        "train": {"max_steps": 12, "batch_size": 2, "rank": 4, "evaluations": 0, "max_length": 64},
    }
    resume = (run / "key.json").is_file()
    settings = config.parse(given, "the test")
    pipeline.build(settings, examples, run, run.parent / "cache", Console(quiet=True), resume=resume)


def merging(adapter: Path, target: Path, cache: Path) -> None:
    import torch
    from rich.console import Console

    from cogpress import remake

    torch.set_num_threads(1)
    remake.merge_of(adapter, target, cache, Console(quiet=True), onto="dequantized")


def drafting(weights: Path, run: Path, examples: Path) -> None:
    import torch
    from rich.console import Console

    from cogpress import remake

    torch.set_num_threads(1)
    remake.draft_of(run.parent, weights, run, examples, Console(quiet=True))


def shipping(root: Path, variables: dict[str, str]) -> None:
    from rich.console import Console

    from cogpress import config
    from cogpress.preflight import place
    from cogpress.push import run as pushing
    from cogpress.push.target import PushTarget

    os.environ.update(variables)
    place.IMAGE_BYTES = 1000
    settings = config.load(root / "model.yaml")
    target = PushTarget.of(root, settings, "local/model", hardware="gpu-l40s")
    pushing.push(target, settings, Console(quiet=True))
