"""The embedded base, and the errors for bases that cannot be had."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cogpress.config import Quantization
from cogpress.errors import CogpressError
from cogpress.weights import base, fetch, manifest


@pytest.mark.slow
def test_the_embedded_base_is_a_normal_checkpoint_converted_once(base_folder: Path, cache: Path) -> None:
    config = json.loads((base_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["_name_or_path"] == "SmolLM2-135M-Instruct"
    assert base.tokenizer(base_folder).chat_template
    facts = manifest.read(base_folder)
    assert facts is not None
    manifest.check(base_folder, facts)
    before = (base_folder / "model.safetensors").stat().st_mtime_ns
    assert fetch.base("embedded", cache) == base_folder
    assert (base_folder / "model.safetensors").stat().st_mtime_ns == before


def test_no_file_of_the_embedded_base_names_this_machine(base_folder: Path) -> None:
    for path in base_folder.glob("*.json"):
        assert "site-packages" not in path.read_text(), path


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"no config\.json"),
        ({"config.json": "{}"}, r"no \.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pickle file.*save_pretrained"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CogpressError, match=said):
        fetch.base(str(tmp_path), tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_base_that_lacks_tensors_is_refused_where_transformers_would_make_them_up(
    tiny_base: Path, tmp_path: Path, quantization: Quantization
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("v_proj.weight"))
    kept = {other: tensor for other, tensor in tensors.items() if other != name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CogpressError, match=f"lacks tensors that its model has: {name}"):
        base.load(folder, quantization)


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="is not a folder"):
        fetch.base("no/such/folder", tmp_path)
    with pytest.raises(CogpressError, match="hf://organisation/name"):
        fetch.base("hf://alone", tmp_path)
    with pytest.raises(CogpressError, match="Could not download hf://organisation/name from the Hub"):
        fetch.base("hf://organisation/name", tmp_path)  # the tests are offline


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's compute dtype is not measured")
@pytest.mark.parametrize(
    ("single", "half", "chosen"), [(1.0, 6.0, "float32"), (1.0, 1.1, "bfloat16"), (2.0, 1.0, "bfloat16")]
)
def test_a_cpu_computes_in_what_is_faster_by_far(
    single: float, half: float, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: single, torch.bfloat16: half}
    monkeypatch.setattr(base, "_product_seconds", seconds.__getitem__)
    assert base.compute_dtype.__wrapped__() == getattr(torch, chosen)
    monkeypatch.undo()
    assert base.compute_dtype.__wrapped__() in seconds


@pytest.mark.parametrize("asked", [False, True])
def test_libraries_warn_only_where_python_is_asked_to(monkeypatch: pytest.MonkeyPatch, asked: bool) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        monkeypatch.setattr(sys, "warnoptions", ["always"] if asked else [])
        base.quiet_libraries()
        for module in ("peft.tuners.tuners_utils", "torch.utils", "cogpress.train.run", "torches"):
            warnings.warn_explicit(module, UserWarning, f"{module}.py", 1, module=module)
    libraries = ["peft.tuners.tuners_utils", "torch.utils"] if asked else []
    assert [str(one.message) for one in seen] == [*libraries, "cogpress.train.run", "torches"]


_PRODUCTS = """
import ctypes
import torch
from cogpress.weights import base

class Heap(ctypes.Structure):
    _fields_ = [(f"field{at}", ctypes.c_size_t) for at in range(10)]

libc = ctypes.CDLL("libc.so.6")
libc.mallinfo2.restype = Heap

def used():
    return libc.mallinfo2().field7

base.compute_dtype()
weight = torch.ones(1536, 576, dtype=torch.bfloat16)
for at in range(300):
    if at == base.KERNELS:
        before = used()
    torch.nn.functional.linear(torch.ones(200 + at, 576, dtype=torch.bfloat16), weight)
print(used() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="asks the C library what is in use")
def test_batches_of_many_lengths_do_not_fill_memory_with_kernels() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    told = subprocess.run(
        [sys.executable, "-c", _PRODUCTS],
        env={**clean, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(told.stdout) < 20e6, "bytes that 172 more shapes left in use"
