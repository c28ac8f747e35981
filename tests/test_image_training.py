"""The environment that `cog build` gives the image: a training runs in it, is canceled in it, and an answer streams."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cogpress.cog import client
from cogpress.cog.process import Server
from cogpress.errors import CogpressError
from tests import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]

IMAGE = {
    name: value
    for name, _, value in (
        line.partition("=") for line in json.loads((ROOT / "tests/fixtures/image-environment.json").read_text())
    )
    if name not in ("PATH", "LD_LIBRARY_PATH")  # the image's own folders
}

PIPELINE = """
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from cogpress.errors import CogpressError


class UnfitError(CogpressError):
    def __init__(self, reason, built):
        super().__init__(reason)
        self.built = built


def new_run(root):
    return root / "runs" / "training"


def from_inputs(root, inputs, run, tar):
    run.mkdir(parents=True)
    print("training begins", flush=True)
    if inputs["max_steps"] == 13:
        raise CogpressError("The examples are empty.")
    if inputs["max_steps"] == 14:
        os._exit(9)
    if inputs["max_steps"] > 100:  # like a loader's worker: a process of its own that does not hear SIGTERM
        ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        subprocess.Popen([sys.executable, "-c", ignore])
        time.sleep(600)
    tar = run / "weights.tar"
    tar.write_text(json.dumps(inputs))
    if inputs["max_steps"] == 15:
        raise UnfitError("The merge is worse than the usual one.", SimpleNamespace(tar=tar))
    return SimpleNamespace(tar=tar)
"""
"""Stands for cogpress.pipeline, whose own tests train."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """This project with a training that takes no model."""
    root = tmp_path / "project"
    (root / "cogpress").mkdir(parents=True)
    for name in ("cog.yaml", "predict.py", "train.py"):
        shutil.copyfile(ROOT / name, root / name)
    for item in (ROOT / "cogpress").iterdir():
        if item.name not in ("pipeline.py", "__pycache__"):
            (root / "cogpress" / item.name).symlink_to(item)
    (root / "cogpress" / "pipeline.py").write_text(PIPELINE)
    return root


@pytest.fixture
def server(root: Path) -> Any:
    with Server(root, mode="train", env=IMAGE, log=root / "server.log") as server:
        server.wait_ready(120)
        yield server


def data(**more: Any) -> dict[str, Any]:
    return {"train_data": f"data:text/plain;base64,{base64.b64encode(b'examples').decode()}", **more}


def below(server: Server) -> set[psutil.Process]:
    """The processes that the server started, but the worker that it always has."""
    assert server.pid is not None
    return {
        process
        for process in psutil.Process(server.pid).children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and "coglet" not in " ".join(process.cmdline())
    }


def test_the_image_sets_what_a_server_here_sets(root: Path) -> None:
    """The servers of all other tests, too, run as the image does."""
    assert IMAGE["COG_MAX_CONCURRENCY"] == "80"
    made = Server(root, mode="train")._variables({}, IMAGE["COG_PREDICT_TYPE_STUB"], IMAGE["COG_TRAIN_TYPE_STUB"])
    for name in ("COG_MAX_CONCURRENCY", "COG_PREDICT_TYPE_STUB", "COG_TRAIN_TYPE_STUB"):
        assert made[name] == IMAGE[name]


def test_a_training_in_the_image_gives_its_tar_and_its_log(server: Server) -> None:
    done = client.train(server.url, data(max_steps=5, skip_bad_lines=True))
    assert done["status"] == "succeeded"
    assert "training begins" in done["logs"]
    given = json.loads(base64.b64decode(done["output"]["weights"].partition(",")[2]))
    assert (given["max_steps"], given["skip_bad_lines"], given["rank"]) == (5, True, None)
    assert Path(given["train_data"]).is_absolute()
    assert "NOT FIT" not in done["logs"]
    # What was paid for is not thrown away: the weights are refused later, and the adapter is with them.
    shutil.rmtree(server.root / "runs")
    unfit = client.train(server.url, data(max_steps=15))
    assert unfit["status"] == "succeeded"
    assert "NOT FIT TO BE SERVED: The merge is worse than the usual one." in unfit["logs"]


def test_a_training_that_fails_says_why(server: Server) -> None:
    with pytest.raises(CogpressError, match=r"^The examples are empty\.$"):
        client.train(server.url, data(max_steps=13))
    shutil.rmtree(server.root / "runs")
    with pytest.raises(CogpressError, match=r"^The training's process ended early, with exit status 9\."):
        client.train(server.url, data(max_steps=14))


def test_a_canceled_training_ends_and_the_next_one_runs(server: Server, root: Path) -> None:
    before = below(server)
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        body = {"input": data(max_steps=1000)}
        answers.append(httpx.put(f"{server.url}/trainings/long", json=body, timeout=60).json())

    asking = threading.Thread(target=ask)
    asking.start()
    # The training and its own process; the loop is free meanwhile.
    assert wait_until(lambda: len(below(server) - before) == 2), below(server)
    started = below(server) - before
    assert client.health(server.url) is not None
    assert httpx.post(f"{server.url}/trainings/long/cancel").status_code == 200
    asking.join(60)
    assert [answer["status"] for answer in answers] == ["canceled"]
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left
    assert not (root / "runs" / "training" / "weights.tar").exists()
    shutil.rmtree(root / "runs")
    assert wait_until(lambda: (client.health(server.url) or {})["status"] == "READY")
    assert client.train(server.url, data(max_steps=1))["status"] == "succeeded"


def test_a_training_ends_when_the_runtime_is_killed(server: Server) -> None:
    before = below(server)

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{server.url}/trainings", json={"input": data(max_steps=1000)}, timeout=60)

    threading.Thread(target=ask, daemon=True).start()
    assert wait_until(lambda: len(below(server) - before) == 2)
    started = below(server) - before
    assert server.pid is not None
    for process in [*psutil.Process(server.pid).children(), psutil.Process(server.pid)]:
        process.kill()
    _, left = psutil.wait_procs(started, timeout=60)
    assert not left


RUNNER = """
import cog
from cog import BaseRunner, ConcatenateIterator
from cogpress.cog import streaming


class Runner(BaseRunner):
    def setup(self) -> None:
        streaming.install()

    @cog.streaming
    @cog.concurrent(max=80)
    async def run(self, prompt: str) -> ConcatenateIterator[str]:
        async def words():
            for word in prompt.split():
                yield word

        return streaming.stream(words())
"""


def test_an_answer_streams_in_the_image(root: Path) -> None:
    (root / "predict.py").write_text(RUNNER)
    with Server(root, env=IMAGE, log=root / "server.log") as server:
        server.wait_ready(120)
        events = [(event.kind, event.text) for event in client.stream(server.url, {"prompt": "a b"})]
    assert [text for kind, text in events if kind == "output"] == ["a", "b"]
    assert events[-1][0] == "completed"
