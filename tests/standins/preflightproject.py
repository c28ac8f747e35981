"""A small project that passes preflight, with stand-ins for docker, cog and Replicate; tests break one thing of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cogpress.cog.process import CPU_IMAGE
from cogpress.preflight.image import NEVER
from cogpress.weights import manifest

ROOT = Path(__file__).resolve().parents[2]

TOKEN = "r8_preflight-test-token"  # what no output may hold

COG = """\
build:
  gpu: true
  cuda: "13.0"
  python_version: "3.12"
  sdk_version: "0.23.1"
  python_requirements: requirements/gpu.lock
  run:
    - uv pip install --no-deps --break-system-packages coglet==0.23.1
    - curl --fail --output /usr/local/bin/tool https://example.com/tool
environment:
  - DO_NOT_TRACK=1
run: "predict.py:Runner"
train: "train.py:train"
"""

RUNNER = """\
from typing import Optional
import cog
from cog import BaseRunner, ConcatenateIterator, Input

CHOICES = ["a", "b"]

class Runner(BaseRunner):
    @cog.streaming
    @cog.concurrent(max=8)
    async def run(
        self,
        prompt: str = Input(description="What to ask.", default=""),
        count: Optional[int] = Input(description="How many.", default=None, ge=-1, le=9),
        kind: str = Input(description="Which.", default="a", choices=CHOICES + ["c"]),
    ) -> ConcatenateIterator[str]:
        def inner():
            yield "text"
        return inner()
"""

TRAINER = """\
import cog
from cog import BaseModel, Input

class TrainingOutput(BaseModel):
    weights: cog.Path

async def train(data: cog.Path = Input(description="Examples.")) -> TrainingOutput:
    return TrainingOutput(weights=data)
"""


def closure(package: str) -> dict[str, str]:
    """What an installed package needs, all the way down, in the versions that are installed."""
    found: dict[str, str] = {}
    for line in metadata.requires(package) or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if not (requirement.marker and not requirement.marker.evaluate({"extra": "", "python_version": "3.12"})):
            found |= {name: metadata.version(name), **closure(name)}
    return found


LOCK = "# The image: Python 3.12\nvllm==0.32.0\ntorch==2.13.0\nnvidia-cuda-runtime==13.0.96\nnvidia-cudnn-cu13==9.2\n"
LOCK += "".join(f"{name}=={version}\n" for name, version in sorted(closure("torch").items()))


def project(root: Path) -> Path:
    """The folder, with verified weights, committed to git."""
    files = {
        "cog.yaml": COG,
        "model.yaml": "name: test\n",
        "predict.py": RUNNER,
        "train.py": TRAINER,
        "requirements/gpu.in": "-r base.in\nvllm==0.32.0\nnvidia-cuda-runtime<13.1\ncolorama; os_name == 'nt'\n",
        "requirements/base.in": "torch==2.13.0  # the one of vLLM\n",
        "requirements/gpu.lock": LOCK,
        ".dockerignore": "\n".join(NEVER) + "\n",
        "weights/config.json": json.dumps({"architectures": ["LlamaForCausalLM"]}),
        "weights/model.safetensors": "not really",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    seal(root)
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "all")
    return root


def for_cpus(root: Path) -> None:
    """Add this repository's own cog.cpu.yaml and its lock."""
    for name in (CPU_IMAGE, "requirements/cpu-image.in", "requirements/cpu-image.lock"):
        shutil.copy(ROOT / name, root / name)
    git(root, "add", ".")
    git(root, "commit", "-qm", "cpu")


def seal(root: Path, **facts: Any) -> None:
    """Write the manifest of the weights as they are, and a verdict that passed."""
    folder = root / "weights"
    for name in ("manifest.json", "verification.json"):
        (folder / name).unlink(missing_ok=True)
    content = manifest.write(folder, "weights", {"base": {"source": "embedded"}, **facts})
    files = {name: file["sha256"] for name, file in content["files"].items()}
    report = {"passed": True, "checks": [], "files": files}
    (folder / "verification.json").write_text(json.dumps(report))


def git(root: Path, *arguments: str) -> None:
    """A git command that depends on no configuration of the user."""
    who = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", *who, *arguments], cwd=root, check=True, capture_output=True)


def program(folder: Path, name: str, answer: str, status: int = 0) -> None:
    """A program that says one thing, and fails where it is given a token."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ -z "$REPLICATE_API_TOKEN" ] || exit 9\necho "{answer}"\nexit {status}\n')
    path.chmod(0o755)


ACCEPTED = 'unknown input "nope"'


def cog(folder: Path, version: str = "0.23.1", says: str = "", **words: str) -> None:
    """A `cog` with Cog's verdict: `says` where it refuses the project, `words` where a command answers by itself.

    What Cog's build alone refuses, its quick questions let pass.
    """
    folder.mkdir(exist_ok=True)
    quick = "" if says.startswith("image build failed") else says
    for name in ("doctor", "run", "train"):
        told = words.get(name, quick if name != "doctor" else "")
        (folder / f"cog-{name}").write_text(told or (ACCEPTED if name != "doctor" else ""))
    path = folder / "cog"
    path.write_text(
        '#!/bin/sh\nenv | grep -q TOKEN && exit 9\n[ "$COG_NO_UPDATE_CHECK$NO_COLOR" = 11 ] || exit 9\n'
        f'case "$*" in\n--version) echo "cog version {version} (built today)"; exit;;\n'
        f'doctor) [ "$COG_SKIP_DOCKER_CHECK$COG_SKIP_GPU_CHECK" = 11 ] || exit 9;;\n'
        '"run -i nope=1"|"train -i nope=1"|"run -f cog.cpu.yaml -i nope=1"|"train -f cog.cpu.yaml -i nope=1");;\n'
        "*) exit 8;;\nesac\n"
        'said=$(dirname "$0")/cog-$1\ncat "$said" >&2\n[ "$1" = doctor ] && [ ! -s "$said" ] && exit 0\nexit 1\n'
    )
    path.chmod(0o755)


class Stub:
    """Routes with their answers, a status each; `busy` answers come first."""

    def __init__(self) -> None:
        self.url = ""
        self.busy: list[tuple[int, dict[str, str]]] = []
        self.asked: list[tuple[str, str | None]] = []
        self.answers: dict[str, tuple[int, Any]] = {
            "/v1/account": (200, {"username": "you"}),
            "/v1/hardware": (200, [{"name": "CPU", "sku": "cpu"}, {"name": "Nvidia L40S GPU", "sku": "gpu-l40s"}]),
            "/v1/models/you/model": (200, {"visibility": "private"}),
        }


@contextmanager
def stub() -> Iterator[Stub]:
    """A server with the stub's answers."""
    made = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append((self.path, self.headers.get("Authorization")))
            status, headers = made.busy.pop(0) if made.busy else (0, {})
            content: Any = {"detail": "busy"}
            if not status:
                status, content = made.answers.get(self.path, (404, {"detail": "nothing there"}))
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
