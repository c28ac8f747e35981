"""Starting, watching and stopping Cog's real runtime, with runners that load no model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cogpress.cog import client, ending
from cogpress.cog import process as server
from cogpress.cog.process import Server, free_port
from cogpress.errors import CogpressError
from tests import wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

RUNNER = """
import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Optional

import cog
from cog import BaseRunner, Input


class Runner(BaseRunner):
    def setup(self, weights: Optional[cog.Path] = None) -> None:
        self.weights = weights
        # Like an engine: a process of its own that does not end with its parent, nor when it is told to.
        ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        self.engine = subprocess.Popen([sys.executable, "-c", ignore])
        behaviour = os.environ.get("BEHAVIOUR", "")
        if behaviour == "fail":
            raise RuntimeError("there are no weights in this folder")
        if behaviour == "slow":
            time.sleep(600)
        if behaviour == "die":
            os.kill(os.getpid(), 9)
        if behaviour == "container":
            from cogpress.cog import ending

            ending.watch(0.2, 3)

    def healthcheck(self) -> bool:
        return os.environ.get("BEHAVIOUR") != "sick"

    @cog.concurrent(max=3)
    async def run(self, seconds: float = Input(default=0.0, ge=0, le=60)) -> str:
        await asyncio.sleep(seconds)
        names = ("COLOUR", "COG_WEIGHTS", "COG_MAX_CONCURRENCY")
        return json.dumps({"weights": str(self.weights), "path": sys.path, **{n: os.environ.get(n) for n in names}})
"""

TRAINING = """
import cog
from cog import BaseModel, Input


class TrainingOutput(BaseModel):
    weights: cog.Path


async def train(train_data: cog.Path, rank: int = Input(default=4, ge=1, le=8)) -> TrainingOutput:
    made = cog.Path("made.txt")
    made.write_text(train_data.read_text() * rank)
    return TrainingOutput(weights=made)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "predict.py").write_text(RUNNER)
    (tmp_path / "train.py").write_text(TRAINING)
    settings = 'environment: ["COLOUR=red"]\nrun: "predict.py:Runner"\ntrain: "train.py:train"\n'
    (tmp_path / "cog.yaml").write_text(settings)
    return tmp_path


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test stops everything that it started, including orphans."""
    monkeypatch.setattr(server, "FAMILY_SECONDS", 0.1)
    monkeypatch.setenv("COGPRESS_TEST", str(tmp_path))  # marks the processes of this test, whoever their parent is
    yield
    assert wait_until(lambda: not marked(tmp_path)), marked(tmp_path)


def marked(mark: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            mine = process.environ().get("COGPRESS_TEST") == str(mark) and process.status() != psutil.STATUS_ZOMBIE
            if mine and process.pid != os.getpid():
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def seen(url: str, **inputs: Any) -> dict[str, Any]:
    return dict(json.loads(client.predict(url, inputs)["output"]))


def process_of(served: Server) -> subprocess.Popen[bytes]:
    assert served._process is not None
    return served._process


def test_a_runner_is_served_as_its_image_would_be(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "some weights").mkdir()
    monkeypatch.chdir(root)
    with Server(root, weights="some weights", log=root / "server.log") as served:
        assert served.wait_ready(120)["status"] == "READY"
        assert any("time.sleep(600)" in command for command in marked(root)), "the check at the end would see nothing"
        got = seen(served.url)
        assert got["COG_WEIGHTS"] == got["weights"] == str(root / "some weights")
        assert got["COLOUR"] == "red"
        assert str(root) in got["path"]
        connections = psutil.Process(process_of(served).pid).net_connections()
        assert [each.laddr for each in connections if each.status == "LISTEN"] == [("127.0.0.1", served.port)]
    assert client.health(served.url) is None
    assert "Setup complete" in (root / "server.log").read_text()


def test_the_decorator_decides_how_many_are_served_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.5)
    with ThreadPoolExecutor(3) as pool, Server(root, log=root / "server.log") as served:
        served.wait_ready(120)
        assert seen(served.url)["COG_MAX_CONCURRENCY"] == "3"
        for _ in range(3):  # the end of the server ends them
            pool.submit(seen, served.url, seconds=60)
        assert wait_until(lambda: (client.health(served.url) or {})["status"] == "BUSY")
        with pytest.raises(CogpressError, match="busy"):
            client.predict(served.url, {})


def test_variables_that_are_given_win(root: Path) -> None:
    with Server(root, env={"COLOUR": "blue", "COG_MAX_CONCURRENCY": "2"}, log=root / "server.log") as served:
        served.wait_ready(120)
        got = seen(served.url)
    assert (got["COLOUR"], got["COG_MAX_CONCURRENCY"], got["COG_WEIGHTS"]) == ("blue", "2", None)


def test_both_modes_run_on_one_folder(root: Path) -> None:
    examples = "data:text/plain;base64,aGVsbG8="
    with Server(root, log=root / "a.log") as predicting, Server(root, mode="train", log=root / "b.log") as training:
        predicting.wait_ready(120)
        training.wait_ready(120)
        assert client.openapi(predicting.url) == client.openapi(training.url)
        with pytest.raises(CogpressError, match=r"seconds: 61.*maximum of 60"):
            client.predict(predicting.url, {"seconds": 61})
        with pytest.raises(CogpressError, match=r"rank: 9.*maximum of 8"):
            client.train(training.url, {"train_data": examples, "rank": 9})
        done = client.train(training.url, {"train_data": examples, "rank": 1})
        assert done["output"] == {"weights": examples}


def fails(root: Path, behaviour: str, timeout: float = 120) -> str:
    with (
        Server(root, env={"BEHAVIOUR": behaviour}, log=root / "server.log") as served,
        pytest.raises(CogpressError) as error,
    ):
        served.wait_ready(timeout)
    return str(error.value)


def test_setup_that_fails_is_quoted(root: Path) -> None:
    message = fails(root, "fail")
    assert message.startswith("The runner's setup failed: RuntimeError: there are no weights in this folder\n")
    assert "Loading predictor" in message  # what the worker logs right before it ends can be lost
    assert message.endswith(f"All of it is in {root / 'server.log'}.")


def test_a_worker_that_dies_in_setup_is_noticed(root: Path) -> None:
    assert fails(root, "die").startswith("The runner's setup failed: worker crashed")


def test_a_failing_health_check_is_noticed(root: Path) -> None:
    assert "user-defined healthcheck returned False" in fails(root, "sick")


def test_waiting_ends_and_setup_is_cut_off(root: Path) -> None:
    assert fails(root, "slow", timeout=1).startswith("The server was not ready after 1 s.")


def test_a_worker_that_cannot_start_is_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime itself would report STARTING forever."""
    monkeypatch.setattr(server, "ALONE_SECONDS", 1.0)
    programs = root / "programs"
    programs.mkdir()
    (programs / "python").write_text("#!/bin/sh\nsleep 0.3\necho this python has no cog >&2\nexit 1\n")
    (programs / "python").chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    with Server(root, env={"PATH": path}, log=root / "server.log") as served, pytest.raises(CogpressError) as error:
        served.wait_ready(120)
    assert str(error.value).startswith("The server's worker process exited before its setup began.")
    assert "this python has no cog" in str(error.value)


def test_the_worker_is_this_python_whatever_path_says(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with Server(root, log=root / "server.log") as served:
        assert served.wait_ready(120)["status"] == "READY"


def test_a_server_that_is_killed_is_noticed(root: Path) -> None:
    with Server(root, env={"BEHAVIOUR": "slow"}, log=root / "server.log") as served:
        assert wait_until(served._has_worker)
        process_of(served).kill()
        with pytest.raises(CogpressError, match=r"exited before it was ready, killed by SIGKILL\.(.|\n)*server\.log"):
            served.wait_ready(120)


def kill_worker(served: Server) -> None:
    [worker] = psutil.Process(served.pid).children()
    worker.kill()


def test_a_killed_worker_ends_the_wait(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime lives on, and refuses everything as if it were busy."""
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.2)
    with Server(root, log=root / "server.log") as served:
        served.wait_ready(120)
        kill_worker(served)
        with pytest.raises(CogpressError, match=r"The server has stopped working \(UNHEALTHY\)"):
            served.wait()
        with pytest.raises(CogpressError, match="has stopped working") as refused:
            client.predict(served.url, {})
        assert not isinstance(refused.value, client.BusyError)


@pytest.mark.parametrize("watched", ["", "1"])
def test_a_container_ends_with_its_worker_unless_something_else_watches_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, watched: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with Server(root, env={"BEHAVIOUR": "container", ending.WATCHED: watched}, log=root / "server.log") as served:
        served.wait_ready(120)
        time.sleep(1.5)
        assert served.alive
        kill_worker(served)
        assert wait_until(lambda: (client.health(served.url) or {}).get("status") != "READY")
        assert wait_until(lambda: not served.alive, 2 if watched else 60) == (not watched)
        assert process_of(served).poll() == (None if watched else -signal.SIGKILL)


@pytest.mark.parametrize("soon", [False, True])
def test_a_server_whose_worker_is_killed_starts_again_unless_it_just_started(
    root: Path, monkeypatch: pytest.MonkeyPatch, soon: bool
) -> None:
    monkeypatch.setattr(server, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(server, "RESTART_SECONDS", 60.0 if soon else 0.0)
    served = Server(root, log=root / "server.log")
    said: list[str] = []

    class Enough(Exception):
        pass

    def ready() -> None:
        said.append("ready")
        if len(said) > 1:
            raise Enough
        kill_worker(served)

    try:
        with pytest.raises(CogpressError if soon else Enough):
            served.serve(ready, said.append)
    finally:
        served.stop()
    assert said[0] == "ready"
    assert [one.partition(" (")[0] for one in said[1:]] == ([] if soon else ["The server has stopped working", "ready"])


def test_a_server_that_ends_later_is_noticed(root: Path) -> None:
    with Server(root, log=root / "server.log") as served:
        served.wait_ready(120)
        httpx.post(f"{served.url}/shutdown")
        with pytest.raises(CogpressError, match="The server exited, with exit status 0"):
            served.wait()


def test_stopping_ends_what_ignores_it_and_can_be_repeated(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.5)
    served = Server(root, log=root / "server.log")
    served.start()
    served.wait_ready(120)
    process_of(served).send_signal(signal.SIGSTOP)
    served.stop()
    served.stop()
    assert client.health(served.url) is None
    with pytest.raises(CogpressError, match="not running"):
        served.wait_ready(1)


PROGRAM = """
import sys, time
from pathlib import Path
from cogpress import cli
from cogpress.cog import process as server
from cogpress.cog.process import Server

server.FAMILY_SECONDS = 0.1

def main():
    served = Server(Path(sys.argv[1]), log=Path(sys.argv[1]) / "server.log")
    served.start()
    served.wait_ready(120)
    print("ready", flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
    raise RuntimeError("a fault")  # nobody stops the server

cli.run(main)
"""


@pytest.mark.parametrize(
    ("then", "number", "status"), [("wait", signal.SIGINT, 130), ("wait", signal.SIGTERM, 143), ("fail", None, 1)]
)
def test_nothing_is_left_when_the_program_ends(root: Path, then: str, number: int | None, status: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(root), then]
    pipe = subprocess.PIPE
    program = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert program.stdout is not None
    assert program.stdout.readline() == "ready\n"
    if number is not None:
        program.send_signal(number)
    _, errors = program.communicate(timeout=60)
    assert program.returncode == status
    assert ("a fault" in errors) == (then == "fail")


def test_what_is_missing_is_named(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CogpressError, match=r"There are no weights at .*nowhere"):
        Server(root, weights=str(root / "nowhere"))
    with pytest.raises(CogpressError, match=r"cog\.yaml does not exist"):
        Server(tmp_path_factory.mktemp("empty")).start()
    wrong = {"run: [": "not YAML", "text": "must be a mapping", "run: predict.py:Runner": "no `train:`"}
    for content, complaint in wrong.items():
        (root / "cog.yaml").write_text(content)
        with pytest.raises(CogpressError, match=complaint):
            Server(root, mode="train").start()
    (root / "cog.yaml").write_text("run: other.py:Runner")
    with pytest.raises(CogpressError, match=r"other\.py.* does not exist"):
        Server(root).start()


def test_weights_at_a_url_are_left_to_the_runner(root: Path) -> None:
    url = "https://example.com/weights.tar"
    with Server(root, weights=url, log=root / "server.log") as served:
        process = psutil.Process(process_of(served).pid)
        assert wait_until(lambda: "COG_WEIGHTS" in process.environ()), "it is still the fork of this process"
        assert process.environ()["COG_WEIGHTS"] == url


def test_a_chosen_port_is_none_that_a_connection_gets_meanwhile() -> None:
    ports = {free_port("127.0.0.1") for _ in range(50)}
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert all(1024 < port < first for port in ports)
    assert len(ports) > 25
    with pytest.raises(CogpressError, match=r"can be used on 192\.0\.2\.1: Cannot assign requested address"):
        free_port("192.0.2.1")


def test_a_port_in_use_is_named(root: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(CogpressError, match=rf"Port {port} on 127\.0\.0\.1 cannot be used: Address already in use"):
            Server(root, port=port).start()
