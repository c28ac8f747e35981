"""An adapter that peft made elsewhere becomes one that the merge, `verify` and serving take."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from cogpress.config import Prompt, Quantization
from cogpress.errors import CogpressError
from cogpress.files import new_folder, read_json, write_json
from cogpress.merge import adapter
from cogpress.weights import base, manifest, skeleton, tensors
from cogpress.weights.filenames import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PICKLES, refuse_pickle, tokenizer_files


def adopt(
    folder: Path, base_folder: Path, target: Path, *, source: str, quantization: Quantization, prompt: Prompt
) -> None:
    """Copy an adapter with its tokenizer, and record what training here would have recorded.

    Args:
        folder: the adapter, in peft's layout.
        base_folder: the base that it was trained on.
        target: the folder to write.
        source: of the base, for people and later steps.
        quantization: how its training held the base; nothing in its files says that.
        prompt: the template and system text that it is to be served with.

    Raises:
        CogpressError: it is no adapter in safetensors, or cannot be merged exactly; nothing is written.
    """
    try:
        config = read_json(folder / ADAPTER_CONFIG)
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise CogpressError(
            f"{folder} holds no adapter: {ADAPTER_CONFIG} is missing or no JSON. Name a folder of peft's."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        for path in sorted(folder.glob("adapter_model*")):
            if path.suffix in PICKLES:
                refuse_pickle(PurePosixPath(path.name), folder)
        raise CogpressError(f"{folder} lacks {ADAPTER_WEIGHTS}. Save the adapter again, with save_pretrained.")
    base.quiet_libraries()
    model = skeleton.of(base_folder)
    stored = tensors.stored(base_folder)
    quantized = sorted(skeleton.quantizable(model, stored)) if quantization != "none" else []
    transposed = sorted(name for name, layer in skeleton.linears(model).items() if skeleton.transposed(layer))
    names = skeleton.file_names(model, stored)
    renamed = {
        name.removesuffix(".weight"): file.removesuffix(".weight")
        for name, file in names.items()
        if name != file and name.endswith(".weight")
    }
    # As `adapter.read` does: peft notes it where it found transposed layers.
    adapter.refuse_unknown({**config, "fan_in_fan_out": config.get("fan_in_fan_out") and not transposed}, folder)
    facts: dict[str, Any] = {
        "base": {"source": source, "fingerprint": manifest.fingerprint(base_folder)},
        "quantization": quantization,
        "compute_dtype": _dtype(base_folder),
        "quantized_modules": quantized,
        **({"transposed_modules": transposed} if transposed else {}),
        **({"file_names": renamed} if renamed else {}),
        "prompt": prompt.model_dump(mode="json"),
    }
    with new_folder(target) as part:
        for name in (ADAPTER_WEIGHTS, *tokenizer_files(folder)):
            (part / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, part / name)
        # What peft notes there is a path of the machine that trained it.
        write_json(part / ADAPTER_CONFIG, {**config, "base_model_name_or_path": source})
        manifest.write(part, "adapter", facts)
        adapter.read(part)


def _dtype(base_folder: Path) -> str:
    """The dtype of the base's checkpoint, in which it is usually trained."""
    config = read_json(base_folder / "config.json")
    found = config.get("dtype") or config.get("torch_dtype") or (config.get("text_config") or {}).get("dtype")
    return str(found or "bfloat16").removeprefix("torch.")
