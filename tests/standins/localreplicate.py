"""The playground in a process of its own, over the real Cog runtime with a runner that needs no model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from cogpress.cog.process import Server, free_port

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "r8_test-token-of-the-local-replicate"

SLOTS = 8

RUNNER = """
import asyncio, os, sys
from typing import Optional
sys.path.insert(0, {root!r})
import cog
from cog import BaseRunner, ConcatenateIterator, Input, Secret
from cogpress.cog import streaming

class Runner(BaseRunner):
    def setup(self, weights: Optional[cog.Path] = None) -> None:
        streaming.install()
        self.weights = str(weights or "")

    async def chunks(self, prompt, count, delay, record):
        if prompt == "fail":
            raise ValueError("bad things happen")
        record("input_token_count", len(prompt.split()))
        for number in range(count):
            if delay:
                await asyncio.sleep(delay)
            yield prompt if prompt.startswith("raw:") else f"{{prompt}}{{number}} "
        print("said it all")
        record("output_token_count", count)

    @cog.streaming
    @cog.concurrent(max={slots})
    async def run(
        self,
        prompt: str = Input(description="What to repeat.", default="word"),
        count: int = Input(description="How often.", default=5, ge=1, le=100000),
        delay: float = Input(description="Seconds between two.", default=0.0, ge=0, le=10),
        system_prompt: Optional[str] = Input(description="Not used.", default=None),
        file: Optional[cog.Path] = Input(description="Its text is said instead.", default=None),
        key: Optional[Secret] = Input(description="A secret.", default=None),
    ) -> ConcatenateIterator[str]:
        if file is not None:
            prompt = "raw:" + open(file).read()
        if prompt == "weights":
            prompt = "raw:" + open(self.weights + "/config.json").read()
        if prompt == "shares":
            prompt = "raw:" + os.environ.get("COGPRESS_ENGINES_PER_GPU", "")
        return streaming.stream(self.chunks(prompt, count, delay, self.scope.record_metric))
"""

TRAINER = """
import asyncio, io, pathlib, tarfile, tempfile
import cog
from cog import BaseModel, Input

class TrainingOutput(BaseModel):
    weights: cog.Path

async def train(
    train_data: cog.Path = Input(description="Examples."),
    steps: int = Input(description="How many.", default=2, ge=1, le=1000),
) -> TrainingOutput:
    text = open(train_data, "rb").read()
    for number in range(steps):
        print(f"step {number}", flush=True)
        await asyncio.sleep(0.2)
    path = pathlib.Path(tempfile.mkdtemp()) / "weights.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("config.json", "notes.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    return TrainingOutput(weights=cog.Path(path))
"""


def project(folder: Path, slots: int = SLOTS) -> Path:
    """A project whose runner repeats a word, and whose training makes weights that say what it was given."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cog.yaml").write_text(
        'build:\n  python_version: "3.12"\nrun: "predict.py:Runner"\ntrain: "train.py:train"\n'
    )
    (folder / "predict.py").write_text(RUNNER.format(root=str(ROOT), slots=slots))
    (folder / "train.py").write_text(TRAINER)
    return folder


@contextmanager
def echoing(folder: Path) -> Iterator[Server]:
    """The real Cog runtime on such a project, ready."""
    root = project(folder)
    with Server(root, log=root / "server.log") as server:
        server.wait_ready(120)
        yield server


def javascript() -> Path:
    """The folder with Replicate's and OpenAI's JavaScript clients, installed on first use."""
    import pytest  # not for the process that this file also is

    folder = ROOT / "tests" / "js"
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node.js and npm are not installed (Debian and Ubuntu: apt install nodejs npm)")
    installed = folder / "node_modules" / ".package-lock.json"
    if not installed.is_file() or installed.stat().st_mtime < (folder / "package-lock.json").stat().st_mtime:
        command = ["npm", "ci", "--silent", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
        if done.returncode:
            pytest.skip(f"npm can not install the JavaScript clients here: {done.stderr.strip()[-300:]}")
    return folder


class Local:
    """The playground as a process; starts on entry, leaves nothing on exit."""

    program = Path(__file__)
    """What is run: this file, or one that ends in its `main`."""

    def __init__(
        self, root: Path, models: list[tuple[str, str]], *, data: Path | None = None, port: int = 0, **more: Any
    ) -> None:
        self.root, self.models, self.more = root, models, more
        self.data = data or root / "data"
        self.port = port or free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Local:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, seconds: float = 60) -> None:
        settings = {"root": str(self.root), "folder": str(self.data), "models": self.models, "port": self.port}
        self.data.mkdir(parents=True, exist_ok=True)
        with (self.data / "local.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self.program), json.dumps({**settings, **self.more})],
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if httpx.get(f"{self.url}/playground/api/config", trust_env=False).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.05)
        raise AssertionError(f"It did not start:\n{(self.data / 'local.log').read_text()}")

    def kill(self) -> None:
        """As a crash would."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(120)
            except subprocess.TimeoutExpired:
                self.kill()

    def ask(self, method: str, route: str, body: Any = None, **more: Any) -> httpx.Response:
        if "token" in self.more:
            more["headers"] = {"Authorization": f"Bearer {TOKEN}", **more.get("headers", {})}
        return httpx.request(method, f"{self.url}{route}", json=body, trust_env=False, timeout=60, **more)

    def create(self, inputs: dict[str, Any], model: str = "local/echo", **more: Any) -> dict[str, Any]:
        headers = {"Prefer": "wait"} if more.pop("wait", False) else {}
        answer = self.ask("POST", f"/v1/models/{model}/predictions", {"input": inputs, **more}, headers=headers)
        assert answer.status_code == (201 if answer.json().get("completed_at") else 202), answer.text
        return dict(answer.json())

    def get(self, identifier: str) -> dict[str, Any]:
        return dict(self.ask("GET", f"/v1/predictions/{identifier}").json())

    def wait(self, identifier: str, seconds: float = 60) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        while (found := self.get(identifier))["status"] in ("starting", "processing"):
            assert time.monotonic() < deadline, found
            time.sleep(0.05)
        return found


def main() -> None:
    from cogpress import cli
    from cogpress.config import Playground, Prompt
    from cogpress.playground import app

    given = json.loads(sys.argv[1])
    given["root"], given["folder"] = Path(given["root"]), Path(given["folder"])
    given["models"] = tuple(map(tuple, given["models"]))
    given["prompt"] = Prompt(**given.pop("prompt", {}))
    given["playground"] = Playground(**given.pop("options", {}))
    cli.run(lambda: app.serve(app.Settings(**given)))


if __name__ == "__main__":
    main()
