"""`scripts/train --on replicate`: one training from the local examples to checked weights, shown while it goes on.

Knows what is printed and where the weights go; leaves the training to `training`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cogpress import manifest, recipe
from cogpress.cli import step
from cogpress.config import Config
from cogpress.errors import CogpressError
from cogpress.push import replicate, training


def run(
    root: Path,
    settings: Config,
    inputs: dict[str, Any],
    *,
    model: str | None,
    console: Console,
    destination: str | None = None,
    hardware: str | None = None,
    no_fetch: bool = False,
    run: Path | None = None,
    install: bool = False,
) -> training.Trained:
    """Train on Replicate.

    Args:
        root: the project's folder.
        settings: of `model.yaml`; `data.train` is used where no examples are named.
        inputs: the training's, by name.
        model: what trains: owner/name, or owner/name:version.
        console: where progress is shown.
        destination: gets the new version; the model where not given.
        hardware: of a destination that is made.
        no_fetch: leave the weights on Replicate.
        run: folder for the weights; `runs/training-ID` where not given.
        install: copy them to `weights/`, too.

    Raises:
        CogpressError: something is missing, Replicate refuses, the training fails, or the weights are not whole.
    """
    if model is None:
        raise CogpressError("Name what trains on Replicate with --model owner/name: scripts/push makes such a model.")
    if no_fetch and install:
        raise CogpressError("--install needs the weights here. Leave --no-fetch out.")
    given = dict(inputs)
    data = given.pop("train_data", None) or settings.data.train
    if data is None:
        raise CogpressError("There are no examples: name them with --train-data, or as data.train in model.yaml.")
    target = destination or model.partition(":")[0]
    api = replicate.connect()
    try:
        with step(f"Upload {data} and start the training", console) as say:
            made = training.start(api, model, target, root / data, given, hardware or "")
            say(f"training {made['id']}")
        with step("Training", console) as say:
            trained = training.follow(api, made, _Log(console), lambda status, found: _tell(console, status, found))
            say(trained.version or "it made no version")
    finally:
        api.close()
    if no_fetch:
        console.print(f"Ask it as {trained.version}.", soft_wrap=True)
        return trained
    folder = run or root / "runs" / f"training-{trained.id}"
    with step("Fetch and check the weights", console) as say:
        found = training.weights(trained, root / ".cache")
        folder.mkdir(parents=True, exist_ok=True)
        recipe.install(found.folder, folder / "weights")
        manifest.write_json(folder / "training.json", {**vars(trained), "model": model, "destination": target})
        say(f"{len((found.manifest or {}).get('files') or {})} files as their manifest says")
    if install:
        recipe.install(folder / "weights", root / "weights")
        console.print("weights/ now holds this model. Serve it with: scripts/serve", soft_wrap=True)
    else:
        console.print(f"Serve it with: scripts/serve --weights {folder / 'weights'}", soft_wrap=True)
    return trained


class _Log:
    """Prints a log as it comes, whole lines at a time where they come in parts."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, text: str) -> None:
        self._console.print(Text(text, "dim"), end="" if text.endswith("\n") else "\n", soft_wrap=True)


def _tell(console: Console, status: str, metrics: dict[str, Any]) -> None:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float))
    console.print(Text(f"  {status}{': ' if shown else ''}{shown}", "cyan"))
