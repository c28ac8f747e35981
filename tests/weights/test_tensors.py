"""Which files a model is read from."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cogpress.errors import CogpressError
from cogpress.weights import tensors
from cogpress.weights.filenames import INDEX, SINGLE

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write(folder: Path, *names: str) -> None:
    """A file for each name, with a tensor of that name."""
    for name in names:
        save_file({name: np.zeros(2, dtype=np.float32)}, folder / name)


@pytest.mark.parametrize(
    ("present", "indexed", "read"),
    [
        ([ONE, TWO, "consolidated.safetensors"], [ONE, TWO], [ONE, TWO]),
        ([ONE, TWO, "model-00003-of-00003.safetensors"], [ONE, TWO], [ONE, TWO]),
        ([SINGLE, "consolidated.safetensors"], [], [SINGLE]),
        ([SINGLE, "adapter_model.safetensors"], [SINGLE], [SINGLE]),
        (["adapter_model.safetensors"], [], ["adapter_model.safetensors"]),
        (["a.safetensors", "b.safetensors"], [], ["a.safetensors", "b.safetensors"]),
    ],
)
def test_a_model_is_what_its_index_says(
    tmp_path: Path, present: list[str], indexed: list[str], read: list[str]
) -> None:
    write(tmp_path, *present)
    if indexed:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: name for name in indexed}}))
    assert list(tensors.stored(tmp_path)) == read


def test_a_model_that_programs_read_differently_is_refused(tmp_path: Path) -> None:
    write(tmp_path, ONE, TWO, SINGLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {name: name for name in (ONE, TWO)}}))
    with pytest.raises(CogpressError, match=r"holds model\.safetensors beside the shards"):
        tensors.stored(tmp_path)
    (tmp_path / SINGLE).unlink()
    assert list(tensors.stored(tmp_path)) == [ONE, TWO]
    (tmp_path / TWO).unlink()
    with pytest.raises(CogpressError, match=rf"lacks {TWO}"):
        tensors.stored(tmp_path)
