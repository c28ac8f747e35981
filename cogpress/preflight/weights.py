"""Check the weights to push: present, whole, verified, supported by the hardware, allowed to ship."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rich.filesize import decimal as size

from cogpress import source
from cogpress.config import Serve
from cogpress.errors import CogpressError
from cogpress.plan import estimate, memory
from cogpress.plan.architecture import scheme_of
from cogpress.plan.memory import gigabytes
from cogpress.preflight.check import Check, Finding, failed, passed, skipped, some, warning
from cogpress.preflight.facts import Facts
from cogpress.publish.licence import find_origin, public_name
from cogpress.weights.filenames import PICKLES

TOPIC = "Weights"

NOT_FOR_SALE = re.compile(r"cc-by-nc.*|.*non-?commercial.*|.*research.*", re.IGNORECASE)


def _there(facts: Facts) -> Iterator[Finding]:
    weights, settings = facts.weights, facts.settings
    elsewhere = settings.serve.weights if settings else None
    if weights.bytes and weights.problem is None:
        yield passed(f"{size(weights.bytes)} in weights/")
        if elsewhere:
            yield warning(
                "model.yaml names serve.weights too, but the folder weights/ takes precedence.", "Keep one of the two."
            )
    elif elsewhere:
        found = source.parse(elsewhere)
        if found.kind == "path":
            yield failed(
                f"serve.weights is {found.shown}, a folder on this machine, which the image will not have.",
                "Put it into weights/ (scripts/train --install), or name an https address.",
            )
        elif found.kind == "hub" and not found.revision:
            yield warning(f"{found.shown} can change after the push.", "Name a revision: hf://…@REVISION.")
        else:
            yield passed(f"fetched at the start from {found.shown}")
    else:
        yield failed(
            f"The folder weights/ {weights.problem or 'holds no model'}, and model.yaml names no serve.weights.",
            "scripts/train --install, or name serve.weights.",
        )
    for name in [path.name for path in weights.folder.glob("*") if path.suffix in PICKLES]:
        yield failed(f"weights/{name} is a pickle file, which can run code when loaded.", "Save it as safetensors.")


def _unchanged(facts: Facts) -> Iterator[Finding]:
    weights = facts.weights
    if not weights.bytes or weights.problem:
        yield skipped("there are no weights to check")
    elif weights.different:
        yield failed(weights.different, "Install them again: scripts/train --install.")
    elif weights.manifest is None:
        yield warning(
            "weights/ has no manifest, so its files cannot be checked.",
            "Create them with scripts/train or scripts/merge, which write one.",
        )
    else:
        yield passed(f"{len(weights.manifest.get('files') or {})} files are those of the manifest, by sha256")


def _verified(facts: Facts) -> Iterator[Finding]:
    weights = facts.weights
    if not weights.bytes or weights.problem:
        yield skipped("there are no weights to check")
    elif weights.state == "verified":
        yield passed("exactly these files passed scripts/verify")
    elif weights.state == "failed":
        yield failed("The weights failed verification.", "Read weights/verification.md for the likely cause.")
    elif weights.state == "changed":
        yield failed("The weights changed since they were verified.", "scripts/verify weights")
    else:
        yield failed("The weights are not verified.", "scripts/verify weights")


def _prompt(facts: Facts) -> Iterator[Finding]:
    recorded, settings = (facts.weights.manifest or {}).get("prompt"), facts.settings
    if not isinstance(recorded, dict) or settings is None:
        yield skipped("the weights do not record their prompt")
    elif _rendered(recorded) != _rendered(settings.prompt.model_dump(), typed=bool(recorded.get("fields"))):
        yield warning(
            "model.yaml's prompt differs from the one that the weights were trained with; the image uses theirs.",
            "Train again with the new prompt, or restore the old one.",
        )
    else:
        yield passed("model.yaml's prompt is the one of the training")


def _rendered(prompt: dict[str, Any], *, typed: bool = True) -> tuple[Any, ...]:
    """What of a prompt's settings decides the text that a model gets: descriptions in the form do not."""
    types = {name: field.get("type") for name, field in (prompt.get("fields") or {}).items()}
    return prompt.get("system"), prompt.get("template"), prompt.get("thinking"), types if typed else {}


def _interrupted(facts: Facts) -> Iterator[Finding]:
    if facts.weights.left:
        yield warning(
            f"A writer was interrupted, or is still running: {some(facts.weights.left)}.",
            "--fix restores what it had moved and removes the rest.",
            safe=True,
        )
    else:
        yield passed("no interrupted writer left anything beside weights/ or in runs/")


def _generation(facts: Facts) -> Iterator[Finding]:
    hardware, settings, gpu = facts.request.hardware, facts.settings, facts.hardware
    if not hardware or hardware == "auto":
        yield skipped("no hardware is named", "--hardware SKU")
        return
    if gpu is None:
        yield skipped(f"cogpress does not know {hardware}", "Add it in a file that model.yaml names as plan.hardware.")
        return
    if gpu.gpus == 0:
        if facts.build.get("gpu") is True:
            yield failed(f"The image is for GPUs (build.gpu), but {hardware} has none.", "Name a GPU's SKU.")
        else:
            yield passed(f"{hardware}, and an image for CPUs")
        return
    if facts.build.get("gpu") is not True:
        yield warning(f"{hardware} has a GPU, which an image for CPUs does not use.", "Name hardware without one.")
        return
    capability = gpu.capability
    made = scheme_of(facts.weights.model.get("quantization_config"))
    dtype = settings.serve.dtype if settings else "auto"
    shown = f"{hardware} (compute capability {capability[0]}.{capability[1]})"
    lacking = {name for name, (needed, _) in estimate.NEEDS.items() if capability < needed}
    good = True
    if made in lacking or (made and capability < estimate.OLDEST):
        good = False
        if made == "fp8":
            yield warning(
                f"fp8 weights on {shown}: it computes in 16 bits, so they are smaller but hardly faster.",
                "Use an Ada, Hopper or newer GPU (L40S, H100), or scripts/quantize --scheme int8.",
            )
        else:
            yield failed(f"{shown} does not support {made} weights.", "Use a newer GPU.")
    if dtype == "bfloat16" and "bfloat16" in lacking:
        good = False
        yield failed(f"serve.dtype is bfloat16, which {shown} lacks.", "Write dtype: float16, or auto.")
    if settings and settings.serve.kv_cache_dtype.startswith("fp8") and "fp8" in lacking:
        good = False
        yield failed(f"serve.kv_cache_dtype is fp8, which {shown} lacks.", "Write kv_cache_dtype: auto.")
    if good:
        yield passed(f"{made or 'unquantized'} weights, dtype {dtype}, on {shown}")


def _fits(facts: Facts) -> Iterator[Finding]:
    gpu, settings = facts.hardware, facts.settings
    if gpu is not None and gpu.gpus == 0 and facts.weights.bytes and facts.build.get("gpu") is not True:
        cache = (settings.serve if settings else Serve()).cpu_kv_cache_gb
        needed = memory.host_of_serving_on_cpu(facts.weights.bytes, cache * 2**30)
        told = (
            f"Serving takes about {gigabytes(needed)} of memory for {size(facts.weights.bytes)} of weights and "
            f"{cache:g} GiB of KV cache; {gpu.sku} has {gigabytes(gpu.host_bytes)}"
        )
        if needed > gpu.host_bytes:
            yield failed(f"{told}.", "Lower serve.cpu_kv_cache_gb, quantize the weights, or push to a GPU.")
        else:
            yield passed(told)
        return
    if gpu is None or gpu.gpus == 0 or not facts.weights.bytes:
        yield skipped("no known GPU is named" if facts.weights.bytes else "there are no weights to check")
        return
    served = facts.served
    if served is not None and served.refused:
        yield failed(f"{gpu.sku} {served.refused}.", "scripts/plan shows the hardware that fits; or scripts/quantize.")
        return
    if served is not None:
        told = f"context up to {served.context:,} tokens, or {served.concurrency:,} predictions at once"
        yield passed(f"{gpu.sku}: {told}, as scripts/plan estimates")
        return
    share = (settings.serve if settings else Serve()).memory_share
    room = gpu.gpu_bytes * gpu.gpus * share
    gpus = f"{gpu.gpus} x {gigabytes(gpu.gpu_bytes)}"
    told = f"{size(facts.weights.bytes)} of weights in {gigabytes(room)} of {gpu.sku} ({gpus})"
    if facts.weights.bytes * 1.05 > room:
        yield failed(f"{told} do not fit.", "scripts/plan shows the hardware that fits; or scripts/quantize.")
    elif facts.weights.bytes * 1.25 > room:
        yield warning(f"{told} leave little for the context.", "scripts/plan shows what context and concurrency fit.")
    else:
        yield passed(told)


def _licence(facts: Facts) -> Iterator[Finding]:
    base = facts.base
    if base is None:
        yield skipped("the weights do not record their base")
        return
    asked = facts.hub.get(source.parse(base).repository) if base != "embedded" else None
    if asked is not None and asked.problem:
        yield skipped(f"the licence of {public_name(base)} is on the Hub; {asked.problem}")
        return

    def card_data(repository: str, _revision: str | None) -> dict[str, object]:
        content = next(iter(asked.answers.values())).content if asked else None
        card = content.get("cardData") if isinstance(content, dict) else None
        return card if isinstance(card, dict) else {}

    try:
        found = find_origin(base, card_data)
    except CogpressError as error:
        yield warning(str(error), "Look up the base's licence yourself.")
        return
    licence = found.licence
    if licence is None:
        yield warning(f"The licence of {found.shown} is unknown.", "Look it up, and set it as license_url.")
    elif NOT_FOR_SALE.fullmatch(licence.identifier) or NOT_FOR_SALE.fullmatch(licence.name or ""):
        yield warning(
            f"{found.shown} is {licence.name or licence.identifier}: not for commercial use.",
            "Ask its owner, or use another base.",
        )
    elif licence.identifier in ("other",) or licence.identifier.startswith(("llama", "gemma")):
        yield warning(
            f"{found.shown} is under {licence.name or licence.identifier}, which has conditions of its own"
            f"{': ' + licence.link if licence.link else ''}.",
            "Read what it requires of whoever serves it: a notice, a name, acceptable use.",
        )
    else:
        yield passed(f"{found.shown}: {licence.identifier}")


def _gated(facts: Facts) -> Iterator[Finding]:
    if not facts.hub:
        yield passed("no model of the Hub is named")
        return
    served = facts.settings.serve.weights if facts.settings else None
    for name, asked in facts.hub.items():
        fetched = not facts.weights.bytes and source.parse(served or "").repository == name if served else False
        answer = next(iter(asked.answers.values()), None)
        if asked.problem or answer is None:
            yield skipped(f"{name}: {asked.problem}")
        elif answer.status in (401, 403, 404):
            how = failed if fetched else warning
            yield how(
                f"{name} is private, gated or missing (the Hub answered {answer.status}).",
                "Check the name, accept its terms on its page, and set HF_TOKEN here.",
            )
        elif answer.status != 200 or not isinstance(answer.content, dict):
            yield skipped(f"{name}: the Hub answered {answer.status}")
        elif answer.content.get("gated") or answer.content.get("private"):
            if fetched:
                yield failed(
                    f"{name} is gated or private, and the image has no token to fetch it with.",
                    "Put the weights into weights/, so that they are in the image.",
                )
            else:
                yield warning(f"{name} is gated: its terms apply to models made from it.", "Read them on its page.")
        else:
            yield passed(f"{name} is open")


CHECKS = [
    Check(TOPIC, "there", _there),
    Check(TOPIC, "unchanged", _unchanged),
    Check(TOPIC, "verified", _verified),
    Check(TOPIC, "prompt", _prompt),
    Check(TOPIC, "interrupted writers", _interrupted),
    Check(TOPIC, "GPU generation", _generation),
    Check(TOPIC, "memory", _fits),
    Check(TOPIC, "licence", _licence),
    Check(TOPIC, "gated models", _gated),
]
