"""`scripts/train --on replicate`: from local examples through a training on Replicate to verified weights here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cogpress import pipeline
from cogpress.cli import step
from cogpress.config import Config
from cogpress.errors import CogpressError
from cogpress.files import write_json
from cogpress.plan import report as plan
from cogpress.replicate import routes, training
from cogpress.replicate.api import connect
from cogpress.train.run import validation_file
from cogpress.verify import run as verify
from cogpress.weights import fetch


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
    no_verify: bool = False,
    run: Path | None = None,
    install: bool = False,
) -> training.Trained:
    """Train on Replicate.

    Args:
        root: the project's folder.
        settings: of `model.yaml`; `data.train` is used where no examples are named.
        inputs: the training's, by name.
        model: the trainer: owner/name, or owner/name:version.
        console: for progress.
        destination: the model that gets the new version; by default NAME-trained of the token's account, as the
            newest version of the trainer is what its callers get.
        hardware: of a destination that is created; by default the plan's choice, as for the trainer's.
        no_fetch: leave the weights on Replicate.
        no_verify: do not verify the weights against what the training scored.
        run: folder for the weights; `runs/training-ID` where not given.
        install: also copy them to `weights/`.

    Raises:
        CogpressError: something is missing, Replicate refuses, the training fails, or the weights are damaged or not
            what was trained.
    """
    if model is None:
        raise CogpressError("Name the model that trains with --model owner/name. scripts/push makes such a model.")
    if no_fetch and install:
        raise CogpressError("--install needs the weights here. Leave --no-fetch out.")
    given = dict(inputs)
    data = given.pop("train_data", None) or settings.data.train
    if data is None:
        raise CogpressError("There are no examples. Name them with --train-data, or as data.train in model.yaml.")
    trainer = model.partition(":")[0]
    replicate = connect()
    try:
        account = "" if destination else replicate.ask(routes.account())["username"]
        target = destination or f"{account}/{trainer.rpartition('/')[2]}-trained"
        if target == trainer:
            console.print(f"The new version will be the newest of {trainer}, before anyone has tested it.")
        with step(f"Upload {data} and start the training", console) as say:
            made = training.start(
                replicate, model, target, root / data, given, lambda: hardware or plan.sku(settings, root)
            )
            say(f"training {made['id']}")
        with step("Training", console) as say:
            trained = training.follow(
                replicate,
                made,
                lambda text: console.print(Text(text.rstrip("\n"), "dim"), soft_wrap=True),
                lambda status, found: _tell(console, status, found),
            )
            say(trained.version or "no new version")
    finally:
        replicate.close()
    if no_fetch:
        console.print(f"The new version is {trained.version}.", soft_wrap=True)
        return trained
    folder = run or root / "runs" / f"training-{trained.id}"
    with step("Fetch and check the weights", console) as say:
        found = fetch_weights(trained, root / ".cache")
        folder.mkdir(parents=True, exist_ok=True)
        with_adapter = pipeline.lay_out(found.folder, folder)
        write_json(folder / "training.json", {**vars(trained), "model": model, "destination": target})
        say(f"{len((found.manifest or {}).get('files') or {})} files as their manifest says")
    if not with_adapter:
        console.print(
            "The tar holds no adapter, so the weights cannot be verified. Push "
            f"{trainer} again with this cogpress, whose trainings keep the adapter, and train again.",
            soft_wrap=True,
        )
    elif no_verify:
        console.print(f"Verify them with: scripts/verify {folder / 'weights'}", soft_wrap=True)
    else:
        _verify(root, settings, inputs, root / data, folder, console)
    if install:
        pipeline.install(folder / "weights", root / "weights")
        console.print("weights/ now holds this model. Serve it with: scripts/serve", soft_wrap=True)
    else:
        console.print(f"Serve it with: scripts/serve --weights {folder / 'weights'}", soft_wrap=True)
    return trained


def fetch_weights(trained: training.Trained, cache: Path) -> fetch.FetchedModel:
    """Download a training's weights and check each file against their manifest.

    Raises:
        CogpressError: there are none, they cannot be downloaded, or a file is not the one that was trained.
    """
    if not trained.weights:
        raise CogpressError(f"Training {trained.id} gives no address of weights. Its version is {trained.version}.")
    found = fetch.model(trained.weights, cache)
    if found.manifest is None:
        raise CogpressError(
            f"The weights of training {trained.id} have no manifest, so they cannot be checked: cogpress did not make "
            f"them. They are in {found.folder}."
        )
    return found


def _verify(root: Path, settings: Config, inputs: dict[str, Any], data: Path, run: Path, console: Console) -> None:
    """Verify the fetched weights against what the training scored.

    Raises:
        CogpressError: they cannot be verified, or differ; the weights stay where they are.
    """
    weights = run / "weights"
    try:
        if settings.verify.examples is None:
            given = {name: value for name, value in inputs.items() if name not in ("train_data", "skip_bad_lines")}
            trained = settings.override(given)
            with step("Prepare the training's held-out examples", console):
                pipeline.held_out_again(
                    trained,
                    data,
                    run,
                    root / ".cache",
                    console,
                    validation_path=validation_file(trained, root),
                    skip_bad=bool(inputs.get("skip_bad_lines")),
                )
        found = verify.verify(settings, root, weights, console, run=run)
    except CogpressError as error:
        raise CogpressError(f"{error} The weights are in {weights}, not verified: scripts/verify {weights}") from None
    console.print(*found.tables())
    if not found.passed:
        raise CogpressError(f"{found.causes[0]} The weights are in {weights}; read verification.md there.")


def _tell(console: Console, status: str, metrics: dict[str, Any]) -> None:
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, int | float))
    console.print(Text(f"  {status}{': ' if shown else ''}{shown}", "cyan"))
