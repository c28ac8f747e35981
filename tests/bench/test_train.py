"""TRL is set up as its users do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import train


@pytest.mark.slow
def test_trl_packs_rows_on_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trl import SFTConfig

    assert train.trl_packing() == train.trl_attention() == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **train.trl_packing())
    assert (found.packing, found.packing_strategy) == (True, "bfd")
    assert train.trl_attention().keys() <= {"attn_implementation"}
