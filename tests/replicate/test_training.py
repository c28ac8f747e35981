"""Training on Replicate from this machine, against the local Replicate over the real Cog runtime."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cogpress import config, remote_training
from cogpress.errors import CogpressError
from cogpress.preflight import place
from cogpress.push import dry_run, run
from cogpress.push.target import PushTarget
from cogpress.replicate import training
from cogpress.replicate.api import Replicate
from tests import wait_until
from tests.standins.localreplicate import TOKEN
from tests.standins.pushproject import Machine, machine
from tests.standins.pushreplicate import PushReplicate

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path: Path, remote: PushReplicate, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A project whose image is on Replicate, as local/base."""
    monkeypatch.setattr(place, "IMAGE_BYTES", 1000)
    made = machine(tmp_path, remote.url, monkeypatch)
    (tmp_path / "examples.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    body = {"owner": "local", "name": "base", "visibility": "private", "hardware": "cpu"}
    remote.ask("POST", "/v1/models", body)
    pushed = {"model": "local/base", "root": str(made.root), "separate_weights": False}
    assert remote.ask("POST", "/standin/push", pushed).status_code == 200
    return made


def train(here: Machine, **more: Any) -> tuple[training.Trained, str]:
    file = StringIO()
    settings = config.parse({"data": {"train": "../examples.jsonl"}}, "the test")
    inputs = {"train_data": None, "steps": more.pop("steps", 3), "rank": more.pop("rank", None)}
    default = {"model": "local/base", "hardware": "gpu-l40s", "console": Console(file=file, width=80)}
    made = remote_training.run(here.root, settings, inputs, **default | more)
    assert TOKEN not in file.getvalue()
    return made, file.getvalue()


def test_a_training_from_a_local_file_to_checked_weights(here: Machine, remote: PushReplicate) -> None:
    trained, said = train(here, destination="local/tuned", install=True)
    assert [line for line in said.splitlines() if line.startswith("step")] == ["step 0", "step 1", "step 2"]
    assert said.index("step 0") < said.index("Fetch and check")
    assert "processing" in said
    assert "The tar holds no adapter" in said
    latest = remote.ask("GET", "/v1/models/local/tuned").json()["latest_version"]["id"]
    assert trained.version == f"local/tuned:{latest}"
    folder = here.root / "runs" / f"training-{trained.id}"
    assert json.loads((folder / "weights" / "learnt.json").read_text())["prompt"] == "a"
    assert (here.root / "weights" / "learnt.json").is_file()
    assert json.loads((folder / "training.json").read_text())["version"] == trained.version


def test_weights_can_stay_there(here: Machine) -> None:
    trained, said = train(here, no_fetch=True, steps=1)
    # A model of its own gets it: the trainer's newest version is what its callers get.
    assert trained.version.startswith("local/base-trained:")
    assert trained.version in said
    assert not (here.root / "runs").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": None}, "--model owner/name"),
        ({"model": "local/nothing"}, "no version local/nothing to train with"),
        ({"destination": "local/missing", "hardware": None}, "plan cannot choose hardware.*--hardware SKU"),
        ({"rank": 3}, "has no input rank"),
        ({"steps": 0}, "rejects the request.*less than the minimum"),
        ({"steps": 13}, "failed: ValueError: thirteen steps"),
        ({"no_fetch": True, "install": True}, "Leave --no-fetch out"),
    ],
)
def test_what_is_wrong_is_said(here: Machine, given: dict[str, Any], said: str) -> None:
    with pytest.raises(CogpressError, match=said):
        train(here, **given)


def test_weights_that_are_not_whole_are_refused(here: Machine, tmp_path: Path) -> None:
    trained, _ = train(here, no_fetch=True, steps=1)
    import httpx

    from cogpress.weights import archive

    tar = tmp_path / "weights.tar"
    tar.write_bytes(httpx.get(trained.weights, trust_env=False).content)
    folder = archive.unpack(tar, tmp_path / "unpacked")
    (folder / "learnt.json").write_text("other")
    changed = archive.pack(folder, tmp_path / "changed.tar")
    broken = training.Trained("x", "", str(changed), {}, 0)
    with pytest.raises(CogpressError, match="differs from the manifest"):
        remote_training.fetch_weights(broken, tmp_path / "cache")
    (folder / "manifest.json").unlink()
    bare = training.Trained("x", "", str(archive.pack(folder, tmp_path / "bare.tar")), {}, 0)
    with pytest.raises(CogpressError, match="have no manifest"):
        remote_training.fetch_weights(bare, tmp_path / "cache")


def test_a_training_is_not_started_twice(here: Machine, remote: PushReplicate) -> None:
    remote.fault("POST", "/v1/models/local/base/versions", 503)
    remote.asked()
    with pytest.raises(CogpressError, match="503"):
        train(here)
    assert len([one for one in remote.changes() if one.endswith("/trainings")]) == 1
    remote.fault("POST", "/v1/models/local/base/versions", 429, 1, Retry_After="0")
    trained, said = train(here, no_fetch=True, steps=1, destination="local/base")
    assert trained.version.startswith("local/base:")
    assert "will be the newest of local/base" in said


def test_a_training_that_takes_too_long_is_canceled(here: Machine, remote: PushReplicate) -> None:
    api = Replicate(TOKEN, remote.url)
    made = training.start(api, "local/base", "local/base", here.root.parent / "examples.jsonl", {"steps": 1000}, str)
    with pytest.raises(CogpressError, match="did not end within 2 s and was canceled"):
        training.follow(api, made, lambda _text: None, timeout=2)
    route = f"/v1/trainings/{made['id']}"
    assert wait_until(lambda: remote.ask("GET", route).json()["status"] == "canceled")


def test_a_push_tries_training_too(here: Machine, remote: PushReplicate) -> None:
    here.settings(
        tests=[],
        fuzz={"rounds": 0},
        training={
            "data": "../train-examples.txt",
            "input": {"steps": 2},
            "tests": [{"input": {"prompt": "t", "count": 1}, "exact": "t0 "}],
        },
    )
    settings = config.load(here.root / "model.yaml")
    target = PushTarget.of(here.root, settings, "local/trained", hardware="gpu-l40s")
    file = StringIO()
    console = Console(file=file, width=80)
    with pytest.raises(CogpressError, match=r"train-examples\.txt, which does not exist"):
        run.push(target, settings, console)
    (here.root.parent / "train-examples.txt").write_text("text\n")
    here.commit()
    dry_run.show(target, settings, console)
    assert "/trainings" in file.getvalue()
    shipped = run.push(target, settings, console)
    assert "step 1" in file.getvalue()
    assert shipped.steps[run.TRAINING]["version"].startswith("local/trained-test-trained:")
    versions = remote.ask("GET", "/v1/models/local/trained-test/versions").json()["results"]
    assert len(versions) == 1  # the pushed one alone
    # The version that training made is not the one that is shipped.
    assert shipped.steps[run.TRAINING]["version"].rpartition(":")[2] != shipped.version
    # Old test versions go, but for those that trainings began from.
    again = run.push(replace(target, fresh=True, clean=True), settings, console)
    assert again.steps[run.CLEAN]["deleted"] == 1
    assert "Trainings began from this version" in again.steps[run.CLEAN]["kept"][0]
    [left] = remote.ask("GET", "/v1/models/local/trained-test-trained/versions").json()["results"]
    assert again.steps[run.TRAINING]["version"].endswith(left["id"])
