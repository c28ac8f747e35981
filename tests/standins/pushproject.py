"""A project that passes preflight and runs, on a machine with stand-ins for everything that a push needs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.standins import preflightproject
from tests.standins.localreplicate import ROOT, TOKEN

CLI_TOKEN = "cli-token-of-the-local-registry"
"""For `cog login`, which refuses the token of the API."""

RUNNER = """\
import asyncio, sys
from typing import Optional
import cog
from cog import BaseRunner, ConcatenateIterator, Input
sys.path.insert(0, {root!r})
from cogpress.cog import streaming

class Runner(BaseRunner):
    def setup(self, weights: Optional[cog.Path] = None) -> None:
        streaming.install()

    async def chunks(self, prompt, count, delay, record):
        if prompt == "fail":
            raise ValueError("bad things happen")
        if prompt == "broken":
            raise KeyError("somewhere deep")
        if prompt == "json":
            prompt, count = '{{"op": "COUNT"}}', 1
        record("input_token_count", len(prompt.split()))
        for number in range(count):
            if delay:
                await asyncio.sleep(delay)
            yield prompt if prompt.startswith("{{") else f"{{prompt}}{{number}} "
        record("output_token_count", count)
        record("tokens_per_second", 100.0)
        record("time_to_first_token", 0.01)

    @cog.streaming
    @cog.concurrent(max=8)
    async def run(
        self,
        prompt: str = Input(description="What to repeat.", default="word"),
        count: int = Input(description="How often.", default=3, ge=1, le=100000),
        delay: float = Input(description="Seconds between two.", default=0.0, ge=0, le=10),
        kind: str = Input(description="Which.", default="a", choices=["a", "b"]),
        note: Optional[str] = Input(description="Not used.", default=None),
    ) -> ConcatenateIterator[str]:
        return streaming.stream(self.chunks(prompt, count, delay, self.scope.record_metric))
"""

TRAINER = """\
import asyncio, pathlib, sys, tempfile
import cog
from cog import BaseModel, Input
sys.path.insert(0, {root!r})

class TrainingOutput(BaseModel):
    weights: cog.Path

async def train(
    train_data: cog.Path = Input(description="Examples."),
    steps: int = Input(description="How many.", default=2, ge=1, le=1000),
) -> TrainingOutput:
    import numpy
    from safetensors.numpy import save_file
    from cogpress.weights import archive, manifest
    for number in range(steps):
        print(f"step {{number}}", flush=True)
        await asyncio.sleep(0.2)
    if steps == 13:
        raise ValueError("thirteen steps")
    folder = pathlib.Path(tempfile.mkdtemp()) / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{{}}")
    (folder / "learnt.json").write_text(open(train_data).read())
    save_file({{"a": numpy.zeros(4, "float32")}}, folder / "model.safetensors")
    manifest.write(folder, "weights", {{}})
    return TrainingOutput(weights=cog.Path(archive.pack(folder, folder.with_suffix(".tar"))))
"""

TESTS: list[dict[str, Any]] = [
    {"input": {"prompt": "hi", "count": 2}, "exact": "hi0 hi1 ", "contains": ["hi0", "hi1"], "seconds": 30},
    {"input": {"prompt": "json"}, "json_schema": {"required": ["op"]}, "expected": '{"op": "COUNT"}'},
    {"input": {"prompt": "s", "count": 10, "delay": 0.1}, "streams": True},
    {"input": {"prompt": "c", "count": 10000, "delay": 0.05}, "cancels": True},
    {"input": {"prompt": "fail"}, "error": "bad things"},
]

SETTINGS: dict[str, Any] = {
    "name": "test",
    "push": {"tests": TESTS, "parity": False, "fuzz": {"rounds": 4, "fixed": {"count": 2, "delay": 0}}},
}


@dataclass
class Machine:
    """The machine of a push: the project, and what the stand-in for `cog` recorded."""

    root: Path
    programs: Path

    def calls(self) -> list[list[str]]:
        """The arguments of each call of `cog` since the last time, without preflight's questions."""
        path = self.programs / "cog-calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        found = [json.loads(line)["arguments"] for line in lines]
        return [arguments for arguments in found if arguments[0] in ("login", "push")]

    def violations(self) -> str:
        path = self.programs / "cog-violations.txt"
        return path.read_text() if path.exists() else ""

    def standin(self, **state: Any) -> None:
        """Change how the stand-in for `cog` behaves."""
        path = self.programs / "cog-standin.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **state}))

    def settings(self, **push: Any) -> None:
        """Write model.yaml, with changes in its section `push`."""
        content = {**SETTINGS, "push": {**SETTINGS["push"], **push}}
        (self.root / "model.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        self.commit()

    def swap(self, old: str, new: str) -> None:
        """Change the runner."""
        text = (self.root / "predict.py").read_text()
        assert old in text
        (self.root / "predict.py").write_text(text.replace(old, new))
        self.commit()

    def enlarge(self, *names: str) -> None:
        """Make each of these files big enough for a layer of its own, and seal the weights again."""
        for name in names:
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_bytes(bytes(12_000_000))
        preflightproject.seal(self.root)
        self.commit()

    def commit(self) -> None:
        preflightproject.git(self.root, "add", ".")
        preflightproject.git(self.root, "commit", "-qm", "change", "--allow-empty")


def machine(folder: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with the project, the stand-ins on its PATH and both tokens in its environment."""
    programs = folder / "bin"
    preflightproject.program(programs, "docker", "29.1.0")
    docker = programs / "docker"
    inspect = 'if [ "$1 $2" = "image inspect" ]; then cat "$(dirname "$0")/$(echo "$5" | tr / _)"; exit; fi\n'
    docker.write_text(docker.read_text().replace("\n", "\n" + inspect, 1))
    program = programs / "cog"
    program.write_text(f"#!{sys.executable}\n" + (ROOT / "tests" / "standins" / "cogprogram.py").read_text())
    program.chmod(0o755)
    state = {"api_token": TOKEN, "cli_token": CLI_TOKEN, "url": url, "repository": str(ROOT)}
    (programs / "cog-standin.json").write_text(json.dumps(state))
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_CONFIG", str(folder / "docker"))
    monkeypatch.setenv("REPLICATE_API_TOKEN", TOKEN)
    monkeypatch.setenv("REPLICATE_CLI_AUTH_TOKEN", CLI_TOKEN)
    monkeypatch.setenv("REPLICATE_BASE_URL", url)
    monkeypatch.setenv("SOME_TOKEN", "another secret")
    root = preflightproject.project(folder / "project")
    (root / "predict.py").write_text(RUNNER.format(root=str(ROOT)))
    (root / "train.py").write_text(TRAINER.format(root=str(ROOT)))
    shutil.copy(ROOT / ".gitignore", root)
    made = Machine(root, programs)
    made.settings()
    return made
