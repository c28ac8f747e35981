"""Replicate versus the same weights here, with the real runner and a small random model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.push import parity
from cogpress.replicate.api import Replicate
from tests.standins.localreplicate import ROOT, TOKEN
from tests.standins.preflightproject import seal
from tests.standins.pushproject import Machine, machine
from tests.standins.pushreplicate import PushReplicate

pytestmark = [pytest.mark.slow, pytest.mark.server]

SETTINGS: dict[str, Any] = {
    "name": "test",
    "serve": {"engine": "transformers"},
    "verify": {"examples": "../held-out.jsonl", "served_agreement": 0.9, "served_difference": 0.05},
    "push": {"rows": 6, "parallel": 2},
}


@pytest.fixture(scope="module")
def made(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, PushReplicate]]:
    """A project with the real runner and the small model, and the Replicate that it is pushed to."""
    folder = tmp_path_factory.mktemp("fidelity")
    with PushReplicate(folder / "replicate") as remote, pytest.MonkeyPatch.context() as patch:
        here = machine(folder, remote.url, patch)
        shutil.rmtree(here.root / "weights")
        shutil.copytree(tiny_base, here.root / "weights")
        seal(here.root)
        shutil.copy(ROOT / "predict.py", here.root)
        (here.root / "model.yaml").write_text(yaml.safe_dump(SETTINGS))
        rows = [{"prompt": f"Say {number}.", "completion": f"It is {number}, of course."} for number in range(8)]
        (folder / "held-out.jsonl").write_text("\n".join(map(json.dumps, rows)))
        body = {"owner": "local", "name": "model", "visibility": "private", "hardware": "cpu"}
        assert remote.ask("POST", "/v1/models", body).status_code == 201
        yield here, remote


def version(here: Machine, remote: PushReplicate) -> str:
    pushed = {"model": "local/model", "root": str(here.root), "separate_weights": True}
    answer = remote.ask("POST", "/standin/push", pushed)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def test_the_same_weights_pass_and_others_do_not(made: tuple[Machine, PushReplicate], tmp_path: Path) -> None:
    here, remote = made
    settings = config.load(here.root / "model.yaml")
    found = parity.reference(settings, here.root)
    assert (found.folder, len(found.examples), found.answers) == (here.root / "weights", 6, [])
    api = Replicate(TOKEN, remote.url)
    pushed = version(here, remote)
    checks, metrics = parity.compare(api, pushed, settings, found)
    assert [check.name for check in checks if not check.passed] == [], metrics
    assert metrics["examples"] == 6
    assert metrics["served_difference"] > 0 or metrics["served_agreement"] == 1
    assert min(metrics[name] for name in ("tokens_per_second", "time_to_first_token", "stream_tokens_per_second")) > 0
    # Other weights than those in the image.
    import torch
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    shutil.copytree(found.folder, other)
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(other)
    checks, _ = parity.compare(api, pushed, settings, replace(found, folder=other))
    assert [check.name for check in checks if not check.passed]


def test_a_score_below_the_references_fails(made: tuple[Machine, PushReplicate]) -> None:
    here, remote = made
    settings = config.load(here.root / "model.yaml")
    found = parity.reference(settings, here.root)
    right = replace(found, answers=[example.answer for example in found.examples])
    checks, metrics = parity.compare(Replicate(TOKEN, remote.url), version(here, remote), settings, right)
    assert (metrics["reference_score"], metrics["score"]) == (1.0, 0.0)  # random weights know nothing
    assert [check.name for check in checks if not check.passed] == ["score below the reference"]


def test_the_score_is_compared_on_what_the_reference_answered() -> None:
    settings = config.parse({"verify": {"score": "exact"}}, "the test")
    found = Mock(expected=["a", "b", "c"], answers=[None, "b", "c"])
    scores = parity._scores(settings, found, ["wrong", "b", "wrong"])
    assert scores == {"score": 1 / 3, "reference_examples": 2, "reference_score": 1, "score_loss": 0.5}
    assert parity._scores(settings, Mock(expected=["a"], answers=[None]), ["a"]) == {"score": 1}


def test_a_runner_that_tells_no_log_probabilities_is_named() -> None:
    with pytest.raises(CogpressError, match="records no log-probabilities"):
        parity._answer({"output": ["a"], "metrics": {"output_token_count": 1}})


def test_without_examples_it_is_said(made: tuple[Machine, PushReplicate]) -> None:
    here, _ = made
    settings = config.parse({"serve": {"engine": "transformers"}}, "the test")
    with pytest.raises(CogpressError, match=r"No run in .* holds the adapter.*set push\.parity to false"):
        parity.reference(settings, here.root)
