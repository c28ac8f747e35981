"""The whole way from examples to weights that can be served: prepare, train, merge, compare, pack.

A finished step is recognised by what went into it and not done again.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cogpress import phases
from cogpress.cli import progress_bar, step
from cogpress.config import Config, Merge, Prompt, load
from cogpress.data import prepare as data
from cogpress.data.prepare import Prepared
from cogpress.draft import file as draft
from cogpress.engines.gpus import free_and_total
from cogpress.errors import CogpressError
from cogpress.files import new_folder, read_json, sha256, write_json
from cogpress.merge import adapter as adapters
from cogpress.merge import general, merge
from cogpress.plan import architecture, room
from cogpress.source import parse, shown
from cogpress.train import answers, layers, replay
from cogpress.train import run as training
from cogpress.train.arguments import check_report
from cogpress.verify import distributions, limits, strength
from cogpress.verify import run as verify
from cogpress.weights import archive, base, fetch, manifest, skeleton
from cogpress.weights.filenames import ADAPTER

if TYPE_CHECKING:
    import torch

    from cogpress.prompts import Row
    from cogpress.verify.distributions import Divergence

TAR = "weights.tar"
"""The file of a run that holds its weights and adapter, where it was asked for."""

BALANCE = "balance"
"""The folder of a run for what a balanced merge computes, until it is written."""


@dataclass(frozen=True)
class Built:
    """What a run made, and what was measured on the way."""

    base: Path
    weights: Path
    manifest: dict[str, Any]
    training: training.Result
    merged: Divergence | None
    """From what training scored; None where the comparison failed."""
    naive: Divergence | None
    """Of the usual merge, where that was asked for."""
    tar: Path | None = None


class UnfitError(CogpressError):
    """Finished weights, `built`, are no success by what was measured of them."""

    def __init__(self, reason: str, built: Built) -> None:
        super().__init__(reason)
        self.built = built


def from_inputs(
    root: Path,
    inputs: dict[str, Any],
    *,
    run: Path | None = None,
    resume: bool = False,
    fresh: bool = False,
    tar: bool = False,
    usual: bool = False,
    install_too: bool = False,
    console: Console | None = None,
) -> Built:
    """Build weights from the inputs of a training, over what `model.yaml` says.

    Args:
        root: the project's folder.
        inputs: by the names that `train.py` gives them; `train_data` may be left to `model.yaml`.
        run: the run's folder; `runs/NAME` where not given.
        resume: go on with an interrupted training.
        fresh: delete the run's folder first.
        tar: pack weights and adapter into a tar.
        usual: compare with the usual merge, too.
        install_too: copy the weights to the project's `weights/`.
        console: where progress is shown.

    Raises:
        CogpressError: there are no examples, or a folder would be deleted or replaced that is no run's.
    """
    inputs = dict(inputs)
    skip_bad = bool(inputs.pop("skip_bad_lines", False))
    inputs["train_data"] = str(inputs["train_data"]) if inputs.get("train_data") else None
    config = load(root / "model.yaml").override(inputs)
    if config.data.train is None:
        raise CogpressError(
            "There are no examples to train on. Give --train-data FILE, or set data.train in model.yaml."
        )
    run = run or root / "runs" / config.name
    console = console or Console()
    if fresh:
        training.discard(run, console)
    built = build(
        config,
        root / config.data.train,
        run,
        root / ".cache",
        console,
        validation_path=training.validation_file(config, root),
        general_text=general.file(config.data, root),
        resume=resume,
        skip_bad=skip_bad,
        tar=tar,
        usual=usual,
        copy=install_too,
    )
    if install_too:
        install(built.weights, root / "weights")
    return built


def install(weights: Path, place: Path) -> None:
    """Copy finished weights to the folder that `predict.py` serves by default, replacing what was there.

    The folder's README stays.
    """
    with new_folder(place) as part:
        shutil.copytree(weights, part, dirs_exist_ok=True)
        if (place / "README.md").is_file():
            shutil.copyfile(place / "README.md", part / "README.md")


def lay_out(fetched: Path, run: Path) -> bool:
    """Make a run's folder from its fetched tar: `weights`, and the adapter that they were made with beside it.

    Args:
        fetched: the unpacked tar.
        run: the folder.

    Returns:
        whether the tar holds the adapter.
    """
    with new_folder(run / "weights") as part:
        shutil.copytree(
            fetched, part, dirs_exist_ok=True, ignore=lambda at, _: [ADAPTER] if Path(at) == fetched else []
        )
    if not (fetched / ADAPTER).is_dir():
        return False
    with new_folder(run / ADAPTER) as part:
        shutil.copytree(fetched / ADAPTER, part, dirs_exist_ok=True)
    return True


def held_out_again(
    config: Config,
    path: Path,
    run: Path,
    cache: Path,
    console: Console,
    *,
    validation_path: Path | None = None,
    skip_bad: bool,
) -> None:
    """Tell the examples that a training elsewhere held out, from the same file, and write them into its run's folder.

    Args:
        config: what the training was started with, here.
        path: the examples that it was given.
        run: its folder, with its adapter.
        cache: where base models are kept.
        console: where the report is shown.
        validation_path: the examples to hold out, where a file of their own has them.
        skip_bad: what the training was told.

    Raises:
        CogpressError: it held out others.
    """
    facts = adapters.read(run / ADAPTER).facts
    config = config.model_copy(update={"prompt": Prompt.model_validate(facts["prompt"])})
    base_folder = fetch.base(facts["base"]["source"], cache)
    prepare(config, path, base_folder, run, console, validation_path=validation_path, skip_bad=skip_bad)
    if sha256(run / training.HELD_OUT) != facts.get("held_out"):
        for name in (training.HELD_OUT, training.TRAINED_ON):
            (run / name).unlink()
        raise CogpressError(
            f"The training held out other examples than {path} gives here, so that some that it learnt would be among "
            "them: its model.yaml has another data, seed or max_length. Name examples with verify.examples."
        )


def new_run(root: Path) -> Path:
    """A run folder of its own for a training that Cog asks for, so that no other run is touched."""
    (root / "runs").mkdir(exist_ok=True)
    prefix = time.strftime("training-%Y%m%d-%H%M%S-", time.gmtime())
    return Path(tempfile.mkdtemp(prefix=prefix, dir=root / "runs"))


def prepare(
    config: Config,
    path: Path,
    base_folder: Path,
    run: Path,
    console: Console,
    *,
    validation_path: Path | None = None,
    skip_bad: bool,
) -> Prepared:
    """Check and tokenize the examples; write what a run keeps of them; print the report.

    Raises:
        CogpressError: the examples cannot be trained on; the report is printed anyway.
    """
    run.mkdir(parents=True, exist_ok=True)
    try:
        prepared = data.prepare_as(
            config,
            path,
            base.tokenizer(base_folder),
            base.stop_ids(base_folder),
            validation_path=validation_path,
            skip_bad=skip_bad,
        )
    except data.BadDataError as error:
        console.print(error.report.table())
        raise
    write_json(run / "data.json", prepared.report.to_dict())
    (run / training.HELD_OUT).write_text(data.held_out(prepared), encoding="utf-8")
    (run / training.TRAINED_ON).write_text(data.sample(prepared), encoding="utf-8")
    from cogpress import plots  # drawing takes a second to import

    plots.token_lengths(prepared.report.lengths, config.train.max_length, run / "lengths.png")
    console.print(prepared.report.table())
    return prepared


def build(
    config: Config,
    data_path: Path,
    run: Path,
    cache: Path,
    console: Console,
    *,
    validation_path: Path | None = None,
    general_text: Path | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    tar: bool = False,
    usual: bool = False,
    copy: bool = False,
) -> Built:
    """Train an adapter on a file of examples and merge it into weights, in `run/weights`.

    The weights are whole, and packed, before anything is compared: a comparison that fails loses no training.

    Args:
        config: the validated configuration.
        data_path: the examples.
        run: the run's folder.
        cache: where base models are kept.
        console: where progress is shown.
        validation_path: the examples to hold out, where a file of their own has them.
        general_text: what replayed rows and a balanced merge keep the base's knowledge of; the kit's own where not
            given.
        resume: go on with an interrupted training.
        skip_bad: leave bad lines out instead of refusing the file.
        tar: pack weights and adapter into a tar.
        usual: compare with the usual merge, too.
        copy: the caller will copy the weights, for which the disk must have room, too.

    Raises:
        CogpressError: the examples or the base cannot be trained on or merged, the disk has no room for what follows
            the training, or what came out of it fails `judge`.
    """
    training.check_folder(run)
    check_report(config.train)
    score = verify.scorer(config.verify.score)
    base.quiet_libraries()
    with step("Base model", console):
        if parse(config.base.source).kind == "hub":  # before gigabytes are downloaded
            settings = architecture.config(config.base.source, cache)
            skeleton.check(settings, shown(config.base.source))
            skeleton.refuse_quantized(settings, shown(config.base.source))
        base_folder = fetch.base(config.base.source, cache)
        chosen = layers.choose(base_folder, config.train.target_modules, config.base.quantization)
        for note in chosen.notes:
            console.print(f"  {note}", soft_wrap=True, highlight=False)
    with step("Examples", console):
        prepared = prepare(
            config, data_path, base_folder, run, console, validation_path=validation_path, skip_bad=skip_bad
        )
    if config.merge == "balanced" or general_text:  # refused before anything is trained
        for use in ("fit", "measure"):
            general.pieces(base.tokenizer(base_folder), use, general_text)

    replayed = _replayed(config, prepared, base_folder, general_text, console)

    def begin() -> None:
        taken = room.of_files(base_folder, chosen, config, _compared(prepared))
        if caution := taken.check(run, tar=tar, copy=copy, replaced=[run / "weights", run / TAR]):
            console.print(f"  {caution}", soft_wrap=True, highlight=False)

    def recomputes() -> bool:
        rows = [*prepared.train, *replayed, *prepared.validation]
        return room.recomputes(config, base_folder, rows, free_and_total(1)[0])

    with step("Training", console) as say:
        result = training.train(
            config,
            prepared,
            base_folder,
            run,
            console=console,
            replayed=replayed,
            resume=resume,
            score=score,
            begin=begin,
            checkpointing=phases.apart() and recomputes(),
        )
        say(_trained(result))
    with step("Merge", console) as say:
        content, reused = merge_once(
            config, base_folder, result.adapter, run / "weights", console, prepared, general_text=general_text
        )
        if not reused:
            (run / TAR).unlink(missing_ok=True)  # it holds earlier weights
        say("reused" if reused else f"{content['merge']['layers']} layers, onto the {content['merge']['onto']} base")
    packed = pack(run / "weights", result.adapter, console) if tar else None
    merged = naive = None
    try:
        with step("Comparison with what training scored", console) as say:
            merged, naive = compare_once(base_folder, result.adapter, prepared, run, console, usual=usual)
            say(f"mean KL {merged.mean_kl:.5f} per token")
            console.print(divergence_table(merged, naive, content["merge"]["onto"]))
    except (CogpressError, RuntimeError, MemoryError, OSError) as error:
        console.print(
            f"The weights are finished, in {run / 'weights'}, but their comparison failed: {error} Run scripts/verify.",
            soft_wrap=True,
        )
    built = Built(base_folder, run / "weights", content, result, merged, naive, packed)
    try:
        judge(config, built, score)
    except CogpressError as error:
        raise UnfitError(str(error), built) from None
    return built


def _replayed(
    config: Config, prepared: Prepared, base_folder: Path, general_text: Path | None, console: Console
) -> list[Row]:
    """The rows of general text that `data.replay_share` asks for."""
    if not config.data.replay_share:
        return []
    text = general.pieces(base.tokenizer(base_folder), "fit", general_text)
    made = replay.rows(prepared.train, config.data.replay_share, text, config.train.seed)
    console.print(f"  {len(made)} rows of general text beside the examples (data.replay_share)", highlight=False)
    return made


def judge(config: Config, built: Built, score: verify.Score) -> None:
    """Check that what was measured of finished weights makes them a success. They stay where they are.

    The limit is that of scripts/verify, which measures more.

    Raises:
        CogpressError: the merge diverges more than its limit, or more than the usual merge; or the tuned model gives no
            right answer where the base gives some.
    """
    where = f"The weights stay in {built.weights}, for scripts/verify to find the cause; do not serve them."
    if (found := built.merged) is not None:
        merged = limits.left_out(built.manifest["quantization"], built.manifest["merge"]["onto"])
        limit = limits.of(config.verify, "none", merged).mean_kl
        if not found.mean_kl <= limit:
            advice = " Set merge: dequantized in model.yaml." if config.merge == "original" else ""
            raise CogpressError(
                f"The merged weights answer differently from what training scored: mean KL {found.mean_kl:.5f} per "
                f"token, and at most {limit} passes (verify.mean_kl).{advice} {where}"
            )
        # The two are the same merge where the base was not quantized, up to rounding.
        if built.naive is not None and found.mean_kl > built.naive.mean_kl + limit / 10:
            raise CogpressError(
                f"The merge is worse than the usual one: mean KL {found.mean_kl:.5f} per token to what training "
                f"scored, against {built.naive.mean_kl:.5f}. {where}"
            )
    try:
        rows = read_json(built.training.adapter.parent / answers.ANSWERS)
    except (FileNotFoundError, ValueError):
        return
    if answers.fails(rows, score):
        raise CogpressError(
            f"Of {len(rows)} validation answers the tuned model gives none as expected, and the base does "
            f"(verify.score: {config.verify.score}). See {answers.ANSWERS} in the run; train longer, or with a lower "
            f"train.learning_rate. {where}"
        )


def pack(weights: Path, adapter: Path, console: Console | None = None) -> Path:
    """Write the weights and their adapter to one tar, `weights.tar` beside them, and name it.

    The adapter is what the weights can be verified against, wherever they are fetched to.
    """
    with step("Archive", console or Console()) as say:
        tar = archive.pack(weights, weights.parent / TAR, {ADAPTER: adapter})
        say(f"{tar} ({tar.stat().st_size / 1e6:.0f} MB)")
    return tar


def _trained(result: training.Result) -> str:
    validation = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
    reused = "reused: " if result.reused else ""
    return f"{reused}{result.steps} steps{validation}, {result.tokens_per_second:.0f} tokens/s"


def merge_once(
    config: Config,
    base_folder: Path,
    adapter: Path,
    target: Path,
    console: Console,
    prepared: Prepared | None = None,
    *,
    general_text: Path | None = None,
) -> tuple[dict[str, Any], bool]:
    """Merge, unless `target` already holds this very merge undamaged. Returns the manifest and whether it did.

    A draft of the training rows' answers comes with the weights.
    """
    made_by = manifest.fingerprint(adapter)
    facts = manifest.read(target) if target.is_dir() else None
    wanted = {
        "onto": config.merge,
        "adapter": made_by,
        "text": config.merge == "balanced" and general.key(general_text),
    }
    if facts is not None and merge.asked(facts) == wanted:
        try:
            manifest.check(target, facts)
            return facts, True
        except CogpressError:
            console.print(f"  {target} was changed since it was written; merging again")

    onto, correction, noted = config.merge, None, {}
    if config.merge == "balanced" and prepared is not None:
        choice = balanced(base_folder, adapter, prepared, console, general_text)
        onto, correction = choice.onto, choice.correction
        noted = {"asked": "balanced", "text": wanted["text"], "balance": choice.to_dict()}
    rows = None if prepared is None else prepared.train
    made = phases.run("merge", _merge, base_folder, adapter, target, onto, correction, noted, rows, console=console)
    shutil.rmtree(adapter.parent / BALANCE, ignore_errors=True)
    return made, False


def _merge(
    base_folder: Path,
    adapter: Path,
    target: Path,
    onto: Merge,
    correction: Callable[[str], torch.Tensor] | None,
    noted: dict[str, Any],
    rows: list[Row] | None,
    *,
    console: Console,
) -> dict[str, Any]:
    made_by = manifest.fingerprint(adapter)
    return merge.merge(
        base_folder,
        adapter,
        target,
        onto=onto,
        correction=correction,
        noted=noted,
        progress=progress_bar(console),
        add=None if rows is None else lambda part: draft.make(part, rows, made_by),
    )


def balanced(
    base_folder: Path, adapter: Path, prepared: Prepared, console: Console, general_text: Path | None = None
) -> strength.Choice:
    """Choose how strongly a balanced merge keeps what the base knew; print and draw what was measured.

    What it computes is kept beside the adapter, in `balance/`, until the measurement is done.
    """
    choice = strength.choose(
        base_folder,
        adapter,
        prepared.train,
        _compared(prepared),
        adapter.parent / BALANCE,
        text=general_text,
        progress=progress_bar(console),
    )
    write_json(adapter.parent / "balance.json", choice.to_dict())
    from cogpress import plots

    plots.merges(choice.to_dict()["tried"], choice.strength, adapter.parent / "balance.png")
    console.print(choice.table())
    return choice


def compare_once(
    base_folder: Path, adapter: Path, prepared: Prepared, run: Path, console: Console, *, usual: bool = False
) -> tuple[Divergence, Divergence | None]:
    """Divergence of the run's weights from what training scored, and of the usual merge where asked for.

    They are kept in `divergence.json`, and not measured twice.
    """
    from cogpress.verify.distributions import Divergence

    rows = _compared(prepared)
    key = {
        "weights": manifest.fingerprint(run / "weights"),
        "adapter": manifest.fingerprint(adapter),
        "rows": [row.input_ids for row in rows],
    }
    path = run / "divergence.json"
    known: dict[str, Divergence] = {}
    try:
        saved = read_json(path)
        if saved["key"] == key:
            known = {name: Divergence(**saved[name]) for name in ("merged", "naive") if name in saved}
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    loads: dict[str, distributions.Load] = {"merged": partial(distributions.merged_model, run / "weights")}
    if usual:
        loads["naive"] = partial(distributions.naive_model, base_folder, adapter)
    if missing := {name: load for name, load in loads.items() if name not in known}:
        known |= distributions.compare(
            partial(distributions.reference_model, base_folder, adapter),
            missing,
            rows,
            base.tokenizer(base_folder).pad_token_id or 0,
            progress=progress_bar(console),
        )
        write_json(path, {"key": key, **{name: value.to_dict() for name, value in known.items()}})
    return known["merged"], known.get("naive")


def _compared(prepared: Prepared) -> list[Row]:
    """The rows on which merges are compared."""
    return (prepared.validation or prepared.train)[: distributions.COMPARED_ROWS]


def divergence_table(merged: Divergence, naive: Divergence | None, onto: Merge) -> Table:
    """Divergence of the merge, and of the usual merge, from what training scored."""
    table = Table("merged into", "mean KL per token", "99th percentile", "same top token", title_justify="left")
    names = {
        "dequantized": "the base as training saw it",
        "balanced": "the balanced base",
        "original": "the original weights, as configured",
    }
    for name, value in ((names[onto], merged), ("the original weights (the usual merge)", naive)):
        if value is not None:
            table.add_row(name, f"{value.mean_kl:.5f}", f"{value.p99_kl:.5f}", f"{value.top1_agreement:.1%}")
    return table
