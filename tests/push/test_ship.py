"""This repository pushed with verified weights, and trained again on the result.

With the real runner, vLLM and `push.parity`; the stand-in for Replicate runs what is pushed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from cogpress import config, pipeline
from cogpress.errors import CogpressError
from cogpress.preflight import place
from cogpress.push import run
from cogpress.push.target import PushTarget
from cogpress.train import run as training
from cogpress.verify import report as verdict
from cogpress.weights import manifest
from examples import questions
from tests.standins.localreplicate import ROOT, TOKEN
from tests.standins.preflightproject import git
from tests.standins.pushproject import Machine, machine
from tests.standins.pushreplicate import PushReplicate

pytestmark = [pytest.mark.slow, pytest.mark.server]


@pytest.fixture(scope="module")
def here(
    remote: PushReplicate,
    verified: tuple[Path, verdict.Verdict],
    trained_run: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Machine]:
    """This repository's files as another one, with a run of the worked example and its weights in weights/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "IMAGE_BYTES", 1000)
        made = machine(tmp_path_factory.mktemp("ship"), remote.url, patch)
        shutil.rmtree(made.root)
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).is_file():
                (made.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, made.root / name)
        git(made.root, "init", "-q")
        made.commit()
        (made.root / "runs").mkdir()
        for name, target in ((".venv", ROOT / ".venv"), (".cache", ROOT / ".cache"), ("runs/demo", trained_run)):
            (made.root / name).symlink_to(target)
        pipeline.install(verified[0], made.root / "weights")
        yield made
        assert made.violations() == ""


def shipped(here: Machine) -> tuple[Any, str]:
    file = StringIO()
    settings = config.load(here.root / "model.yaml")
    assert settings.push.parity
    target = PushTarget.of(here.root, settings, "local/observe", hardware="gpu-l40s")
    try:
        made = run.push(target, settings, Console(file=file, width=80, highlight=False))
    except CogpressError as error:
        pytest.fail(f"{file.getvalue()}\n{error}")
    assert TOKEN not in file.getvalue()
    return made, file.getvalue()


def test_the_demonstration_is_shipped(here: Machine) -> None:
    made, said = shipped(here)
    assert [one["passed"] for one in made.steps[run.TESTS]["outcomes"]] == [True, True, True]
    metrics = made.steps[run.PARITY]["metrics"]
    assert metrics["served_agreement"] >= 0.99
    assert metrics["reference_examples"] == metrics["examples"]
    assert metrics["score_loss"] <= 0.05
    assert f"{metrics['served_agreement']:.1%} of tokens agree" in said
    assert made.steps[run.FUZZ]["inputs"] > 0
    # The summary's example is the question of model.yaml.
    assert "player.uid with the highest p95" in said
    again, said = shipped(here)
    assert again.version == made.version
    assert all(again.steps[name]["before"] for name in (run.TEST_PUSH, run.TESTS, run.FUZZ, run.PARITY))


def test_what_is_trained_there_is_verified_here(
    here: Machine, remote: PushReplicate, tiny_base: Path, tmp_path: Path
) -> None:
    shipped(here)
    questions.write(tmp_path, train=64, test=1, seed=5)
    settings = yaml.safe_load((here.root / "model.yaml").read_text())
    settings["serve"] = {"engine": "transformers"}  # verified here with another engine than there
    # Of a random model's tokens none is likelier than others by much, so that rounding decides.
    settings["verify"] = {"mean_kl": 0.05, "p99_kl": 1, "top1_agreement": 0.8, "served_agreement": 0.9}
    (here.root / "model.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(here.root / "scripts" / "train"), "--on", "replicate", "--model", "local/observe"]
    options = f"--train-data {tmp_path}/train.jsonl --base-model {tiny_base} --max-steps 2 --batch-size 2"
    command += f"{options} --validation-share 0.2 --destination local/tuned --hardware gpu-t4 --install".split()
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert TOKEN not in done.stdout + done.stderr
    [run] = (here.root / "runs").glob("training-*")
    assert manifest.state(run / "weights") == "verified"
    assert manifest.state(here.root / "weights") == "verified"
    assert not (here.root / "weights" / "adapter").exists()
    # The examples that it was verified with are not among those that it learnt.
    held = len((run / training.HELD_OUT).read_text().splitlines())
    assert held >= 12
    assert (manifest.read_verification(run / "weights") or {})["examples"] == held
    assert remote.ask("GET", "/v1/models/local/tuned").json()["latest_version"]["id"] in done.stdout
    # With other settings other examples would be held out, some of which it learnt.
    other = config.load(here.root / "model.yaml").override({"validation_share": 0.2, "seed": 1})
    again = [other, tmp_path / "train.jsonl", run, ROOT / ".cache", Console(quiet=True)]
    with pytest.raises(CogpressError, match="held out other examples"):
        pipeline.held_out_again(*again, skip_bad=False)
    assert not (run / training.HELD_OUT).exists()
