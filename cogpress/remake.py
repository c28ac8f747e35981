"""What a finished run gets again or from elsewhere: its draft, another merge, an adapter that peft made elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console

from cogpress.cli import progress_bar, step
from cogpress.config import Merge, Prompt, Quantization
from cogpress.draft import file as draft
from cogpress.errors import CogpressError
from cogpress.files import link, new_folder
from cogpress.merge import adapter as adapters
from cogpress.merge import adopt, merge
from cogpress.quantize import calibrate
from cogpress.source import shown
from cogpress.weights import base, fetch, manifest
from cogpress.weights.filenames import ADAPTER, ADAPTER_CONFIG, DRAFT


def draft_of(root: Path, weights: Path, run: Path | None, examples: Path | None, console: Console) -> Path:
    """Make the draft of finished weights again, from the examples that they were trained on; return its table's file.

    Args:
        root: the project's folder.
        weights: the folder, whose manifest then names the new table.
        run: the run that made them; found by their manifest where not given.
        examples: the training examples, where they have moved.
        console: where progress is shown.

    Raises:
        CogpressError: the weights were changed, or the run or its examples are missing.
    """
    with step("Examples of the training", console) as say:
        source = calibrate.read_made(weights, run)
        rows = calibrate.prepare(source, root, examples).train
        say(f"{len(rows)} rows")
    with step("Draft", console) as say, new_folder(weights) as part:
        # Only what the manifest lists: a report of a verification is about the weights as they were.
        for name in source.facts["files"]:
            if Path(name).parts[0] != DRAFT:
                link(weights / name, part / name)
        made = draft.make(part, rows, str(source.facts["merge"]["adapter"]))
        kept = {name: value for name, value in source.facts.items() if name not in manifest.WRITTEN}
        manifest.write(part, "weights", kept)
        say(f"{len(made.keys):,} contexts")
    return draft.path_in(weights)


def adopted(
    adapter: Path,
    run: Path,
    cache: Path,
    console: Console,
    *,
    source: str | None,
    quantization: Quantization | None,
    prompt: Prompt,
) -> Path:
    """The folder of an adapter with cogpress's manifest: the given one, or a copy in `run` of one made elsewhere.

    Args:
        adapter: the adapter's folder.
        run: the run's folder for one that was made elsewhere.
        cache: where base models are kept.
        console: where progress is shown.
        source: of its base.
        quantization: how its training held the base; `none`, and said, where not given.
        prompt: what it is to be served with.

    Raises:
        CogpressError: it cannot be merged exactly, its base is not named, or the run has another adapter.
    """
    if adapter.is_dir() and manifest.read(adapter) is not None:
        if quantization is not None:
            raise CogpressError(f"{adapter} was trained with cogpress and names its quantization. Leave it out.")
        return adapter
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise CogpressError(f"{adapter} holds no adapter: {ADAPTER_CONFIG} is missing. Name an adapter's folder.")
    if source is None:
        raise CogpressError(
            f"{adapter} was not trained with cogpress. Name the base that it was trained on with --base."
        )
    place = run / ADAPTER
    if place.exists() and manifest.fingerprint(place) != manifest.fingerprint(adapter):
        raise CogpressError(f"{place} is another adapter, which would be replaced. Name another folder with --run.")
    with step("Base model", console):
        base_folder = fetch.base(source, cache)
    with step("Adapter", console) as say:
        adopt.adopt(
            adapter, base_folder, place, source=shown(source), quantization=quantization or "none", prompt=prompt
        )
        say(f"copied to {place}")
    if quantization is None:
        console.print(
            "Merging as trained on the base without quantization. For a QLoRA adapter give --quantization nf4: it was "
            "trained to correct the quantized base.",
            soft_wrap=True,
        )
    return place


def merge_of(
    adapter: Path,
    target: Path,
    cache: Path,
    console: Console,
    *,
    source: str | None = None,
    onto: Merge,
    alone: bool = False,
) -> Path:
    """Merge an adapter into `target`, replacing what is there.

    Args:
        adapter: the adapter's folder, with cogpress's manifest.
        target: the folder to write.
        cache: where base models are kept.
        console: where progress is shown.
        source: of the base, as `base.fetch` takes it; the one that the adapter names, where not given.
        onto: what to merge into.
        alone: write the base as the adapter was trained on it, without the adapter, for several to be served on.

    Raises:
        CogpressError: they do not belong together, or cannot be merged exactly; nothing is written.
    """
    base.quiet_libraries()
    facts = adapters.read(adapter).facts
    with step("Base model", console) as say:
        base_folder = fetch.base(source or facts["base"]["source"], cache)
        say(str(base_folder))
    if alone:
        with step("Base for adapters", console) as say:
            content = merge.write_base(base_folder, adapter, target, progress_bar(console))
            size = sum(file["bytes"] for file in content["files"].values())
            say(f"as training saw it; {size / 1e6:.0f} MB in {target}")
        return target
    made = draft.fitting((target, adapter.parent / "weights"), manifest.fingerprint(adapter))

    def add(part: Path) -> None:
        if made is not None:
            shutil.copytree(made, part / made.name)

    with step("Merge", console) as say:
        content = merge.merge(base_folder, adapter, target, onto=onto, progress=progress_bar(console), add=add)
        size = sum(file["bytes"] for file in content["files"].values())
        say(f"{content['merge']['layers']} layers, onto the {onto} base; {size / 1e6:.0f} MB in {target}")
    if made is None:
        console.print("They have no draft, which would make them answer faster: scripts/draft makes one.")
    return target
