"""`scripts/playground` as a user starts and stops it, with a light runner; and servers that start slowly."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cogpress.playground.records import Options, Prediction, Version
from tests import wait_until
from tests.standins.localreplicate import ROOT, Local, echoing, project

pytestmark = pytest.mark.slow


def kit(folder: Path, setup: str = "") -> Path:
    """A project with the real command and the light runner, whose setup runs `setup`."""
    root = project(folder)
    runner = root / "predict.py"
    runner.write_text(runner.read_text().replace("streaming.install()", f"streaming.install()\n        {setup}"))
    (root / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "playground", root / "scripts")
    for name in ("cogpress", "examples"):
        (root / name).symlink_to(ROOT / name)
    (root / "model.yaml").write_text("name: echo\nplayground:\n  retention_days: 3\n")
    (root / "weights").mkdir()
    (root / "weights" / "config.json").write_text("weights of the project")
    return root


def servers(root: Path) -> list[psutil.Process]:
    """Every process of a project."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline"]):
        if process.info["cwd"] == str(root) or str(root) in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return found


class Command:
    """The command as a process, and its output."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, root / "scripts" / "playground", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)

    def wait_for(self, text: str, seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while not (found := [line for line in self.said if text in line]):
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)
        return found[0]

    def interrupt(self) -> int:
        """As Ctrl-C does; the server is in another session and gets no signal."""
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(120)
        self._reading.join(60)
        return status


@contextmanager
def command(root: Path, *arguments: str) -> Iterator[Command]:
    made = Command(root, *arguments)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.process.terminate()
            made.process.wait(120)


def test_it_says_where_it_is_and_leaves_nothing_running(tmp_path: Path) -> None:
    root = kit(tmp_path / "kit")
    with command(root, "--port", "0") as playground:
        playground.wait_for("Starting")
        ready = playground.wait_for("Ready at")
        match = re.search(r"Ready at (http://127\.0\.0\.1:\d+) with local/echo\.", ready)
        assert match is not None, ready
        url = match[1]
        assert f"REPLICATE_BASE_URL={url}" in playground.wait_for("REPLICATE_BASE_URL")
        assert "<title>" in httpx.get(url, trust_env=False).text
        config = httpx.get(f"{url}/playground/api/config", trust_env=False).json()
        assert [(one["name"], one["versions"][0]["label"]) for one in config["models"]] == [("echo", "weights")]
        assert any("cog.server.http" in process.cmdline() for process in servers(root))  # before anybody asked
        answer = httpx.post(
            f"{url}/v1/models/local/echo/predictions",
            json={"input": {"prompt": "weights", "count": 1}},
            headers={"Prefer": "wait"},
            trust_env=False,
            timeout=60,
        )
        assert answer.json()["output"] == ["raw:weights of the project"]
        assert (root / "runs" / "playground" / "predictions.sqlite").is_file()
        assert playground.interrupt() == 130
    said = "".join(playground.said)
    assert "Traceback" not in said
    assert said.endswith("Stopped.\n")
    assert servers(root) == []


def test_it_can_be_stopped_while_the_model_starts(tmp_path: Path) -> None:
    root = kit(tmp_path / "kit", "import time; time.sleep(120)")
    with command(root, "--port", "0") as playground:
        playground.wait_for("Starting")
        assert wait_until(lambda: any("cog.server.http" in process.cmdline() for process in servers(root)))
        assert playground.interrupt() == 130
    assert "Ready" not in "".join(playground.said)
    assert "Traceback" not in "".join(playground.said)
    assert servers(root) == []


def test_a_model_that_does_not_start_is_told(tmp_path: Path) -> None:
    root = kit(tmp_path / "kit", 'raise ValueError("no such engine")')
    with command(root, "--port", "0") as playground:
        assert playground.process.wait(60) == 1
        playground._reading.join(60)
    said = "".join(playground.said)
    assert "no such engine" in said
    assert "Traceback" not in said.partition("The log ends")[0]
    assert servers(root) == []


@pytest.mark.parametrize("requested", [False, True])
def test_a_canceled_prediction_does_not_fail_of_it(requested: bool) -> None:
    version = Version("1", "local/m", 1.0, {}, "folder:x", "", None)
    prediction = Prediction("a", version, {}, {}, Options())
    prediction.cancel_requested = requested
    prediction.fail("The generator was closed.", fault="server")
    if requested:
        assert (prediction.status, prediction.error, prediction.fault) == ("canceled", None, None)
        assert "".join(prediction.logs) == "After the cancellation: The generator was closed.\n"
    else:
        assert (prediction.status, prediction.error, prediction.fault) == (
            "failed", "The generator was closed.", "server",
        )  # fmt: skip


WAITS = "import os, time\n        while not os.path.exists('go'):\n            time.sleep(0.02)"
"""A setup that ends once the project has a file `go`."""


def test_what_waits_for_a_server_to_start_is_canceled_at_once(tmp_path: Path) -> None:
    root = kit(tmp_path / "kit", WAITS)
    with Local(root, [("echo", f"folder:{root / 'weights'}")]) as local:
        made = [local.create({"prompt": "slow", "count": 2}) for _ in range(3)]
        canceled = local.ask("POST", f"/v1/predictions/{made[0]['id']}/cancel").json()
        assert canceled["status"] == "canceled"
        # The others' server goes on starting.
        (root / "go").touch()
        found: list[dict[str, Any]] = [local.wait(one["id"]) for one in made[1:]]
        assert [one["output"] for one in found] == [["slow0 ", "slow1 "]] * 2
        again = local.get(made[0]["id"])
        assert (again["status"], again["output"]) == ("canceled", None)
    assert servers(root) == []


def test_who_waits_for_a_server_that_fails_is_told_without_another_try(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    root = kit(
        tmp_path / "kit",
        f'open({str(starts)!r}, "a").write("x")\n        {WAITS}\n        raise ValueError("broken weights")',
    )
    with Local(root, [("echo", f"folder:{root / 'weights'}")]) as local:
        made = [local.create({"prompt": "slow", "count": 2}) for _ in range(6)]
        (root / "go").touch()
        found = [local.wait(one["id"]) for one in made]
        assert {one["status"] for one in found} == {"failed"}
        assert all("broken weights" in one["error"] for one in found)
        assert len(starts.read_text()) == 1
        assert local.create({"prompt": "later"}, wait=True)["status"] == "failed"
        assert len(starts.read_text()) == 2
    assert servers(root) == []


def test_versions_are_told_apart_by_labels(tmp_path: Path) -> None:
    with echoing(tmp_path / "echo") as cog:
        other = cog.url.replace("127.0.0.1", "localhost")
        for models, labels in (
            ([("echo", cog.url), ("echo:tuned", other)], [f"127.0.0.1:{cog.port}", "tuned"]),
            ([("echo:base", cog.url), ("echo:tuned", other)], ["base", "tuned"]),  # the same ones, named anew
        ):
            with Local(cog.root, models) as local:
                config = local.ask("GET", "/playground/api/config").json()
                assert [one["label"] for one in config["models"][0]["versions"]] == labels[::-1]
                listed = local.ask("GET", "/v1/models/local/echo/versions").json()["results"]
                assert [one["label"] for one in listed] == labels[::-1]
                one = local.ask("GET", f"/v1/models/local/echo/versions/{listed[1]['id']}").json()
                assert one["label"] == labels[0]


def test_what_is_deleted_is_said_to_be(tmp_path: Path) -> None:
    with (
        echoing(tmp_path / "echo") as cog,
        Local(cog.root, [("echo", cog.url)], options={"retention_count": 1}) as local,
    ):
        first = local.create({"count": 1}, wait=True)
        local.create({"count": 1}, wait=True)
        local.stop()
        local.start()
        for route in (f"/v1/predictions/{first['id']}", f"/playground/api/predictions/{first['id']}/rating"):
            answer = local.ask("GET", route)
            assert answer.status_code == 404
            assert "It was deleted" in answer.json()["detail"]
        answer = local.ask("GET", first["urls"]["stream"].removeprefix(local.url))
        assert (answer.status_code, answer.json()["detail"]) == (404, "This prediction was deleted.")
        assert local.ask("GET", f"/p/{first['id']}").status_code == 200  # the page, which says it
