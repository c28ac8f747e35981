"""Options that cannot be trained with are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.train import run as training
from cogpress.train.arguments import SCHEDULES, arguments, optimizer

pytestmark = pytest.mark.train


def test_a_layer_that_does_not_exist_is_named(tiny_base: Path) -> None:
    with pytest.raises(
        CogpressError, match=r"target_modules names nonsense, which is no linear layer .* Choose from q_proj"
    ):
        training.adapted(config.Config().override({"target_modules": "nonsense"}), tiny_base)


def test_every_optimizer_and_schedule_has_transformers_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.training_args import OptimizerNames

    allowed = {name: config.Train.model_json_schema()["properties"][name]["enum"] for name in ("optimizer", "schedule")}
    assert set(allowed["schedule"]) == set(SCHEDULES)
    for cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        names = [name for name in allowed["optimizer"] if cuda or not name.startswith("paged")]
        assert {optimizer(config.Train(optimizer=name)) for name in names} <= set(OptimizerNames)
        assert optimizer(config.Train()) == ("adamw_torch_fused" if cuda else "adamw_torch")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what only a GPU has")
def test_an_optimizer_of_gpus_is_refused_without_one(tmp_path: Path) -> None:
    settings = config.Train(optimizer="paged_adamw_8bit")
    with pytest.raises(CogpressError, match="needs a GPU"):
        arguments(settings, tmp_path, 8, False, torch.float32)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_mixed_precision_is_that_of_the_compute_dtype(compute: torch.dtype, tmp_path: Path) -> None:
    found = arguments(config.Train(optimizer="adamw"), tmp_path, 8, False, compute)
    assert (found.bf16, found.fp16) == (compute == torch.bfloat16, False)


def test_one_process_uses_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    finish = TrainingArguments.__post_init__

    def with_two(self: TrainingArguments) -> None:
        finish(self)
        self._n_gpu = 2

    monkeypatch.setattr(TrainingArguments, "__post_init__", with_two)
    found = arguments(config.Train(optimizer="adamw", batch_size=3), tmp_path, 8, False, torch.float32)
    assert (found.n_gpu, found.train_batch_size) == (1, 3)
