"""Every prediction is accounted for when one of the processes dies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cogpress.cog.process import Server
from cogpress.config import Playground
from cogpress.errors import CogpressError
from cogpress.playground import app
from tests.standins.localreplicate import SLOTS, Local, echoing, project

pytestmark = pytest.mark.slow

LONG = {"count": 2000, "delay": 0.02}


def kill_family(pid: int) -> None:
    leader = psutil.Process(pid)
    family = [leader, *leader.children(recursive=True)]
    for process in family:
        process.kill()
    deadline = time.monotonic() + 60
    while any(map(alive, family)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: psutil.Process) -> bool:
    """Whether it still runs; a dead one stays a zombie until its parent looks for it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(local: Local, status: str, identifiers: list[str], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not all(local.get(one)["status"] == status for one in identifiers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_local_replicate_is_killed_and_starts_again(tmp_path: Path) -> None:
    with echoing(tmp_path / "echo") as cog:
        local = Local(cog.root, [("echo", cog.url)])
        with local:
            done = local.create({"prompt": "before", "count": 2}, wait=True)
            running = [local.create(LONG) for _ in range(SLOTS)]
            wait_for(local, "processing", [one["id"] for one in running])
            waiting = [local.create(LONG) for _ in range(3)]
            local.kill()
        with local:
            assert local.get(done["id"]) == done
            for one in running + waiting:
                found = local.get(one["id"])
                assert found["status"] == "failed"
                assert "ended while this was waiting or running" in found["error"]
                assert found["completed_at"]
            assert local.ask("GET", "/playground/api/history?status=failed").json()["total"] == SLOTS + 3
            # The dropped connections canceled them in the model server too, so that there is room again.
            assert local.create({"count": 1}, wait=True)["status"] == "succeeded"
            stream = local.ask("GET", done["urls"]["stream"].removeprefix(local.url))
            assert stream.text.count("event: output") == 2
            assert stream.text.endswith("event: done\nid: 4:2\ndata: {}\n\n")


def test_the_model_server_is_killed_and_started_again(tmp_path: Path) -> None:
    with echoing(tmp_path / "echo") as cog:
        port = cog.port
        with Local(cog.root, [("echo", cog.url)]) as local:
            running = [local.create(LONG) for _ in range(SLOTS)]
            wait_for(local, "processing", [one["id"] for one in running])
            waiting = [local.create({"count": 2}) for _ in range(3)]
            assert cog.pid is not None
            kill_family(cog.pid)
            for one in running:
                found = local.wait(one["id"])
                assert found["status"] == "failed"
                assert "stopped while this prediction ran" in found["error"]
                assert found["output"]
            with Server(cog.root, log=cog.log, port=port) as again:
                again.wait_ready(120)
                for one in waiting:
                    found = local.wait(one["id"])
                    assert found["status"] == "succeeded", found["error"]
            lost = local.create({"count": 1})
            found = local.wait(lost["id"])
            assert found["status"] == "failed"
            assert "does not answer" in found["error"]
            assert local.ask("GET", "/v1/account").status_code == 200


def test_a_server_of_our_own_is_started_on_demand_again_and_cleaned_up(tmp_path: Path) -> None:
    root = project(tmp_path / "echo")
    weights = [tmp_path / name for name in ("first", "second")]
    for folder in weights:
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    models = [("echo", f"folder:{weights[0]}"), ("echo", f"folder:{weights[1]}")]
    local = Local(root, models, servers_at_once=1)

    def servers() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            line = process.info["cmdline"] or []
            if "cog.server.http" in line and process.info["cwd"] == str(root):
                found.append(process)
        return found

    with local:
        versions = [one["id"] for one in local.ask("GET", "/v1/models/local/echo/versions").json()["results"]]
        assert not servers()  # listing needs none
        for version, name in zip(versions, ("second", "first"), strict=True):
            body: dict[str, Any] = {"version": version, "input": {"prompt": "weights", "count": 1}}
            made = local.ask("POST", "/v1/predictions", body, headers={"Prefer": "wait"}).json()
            assert made["output"] == [f"raw:{name}"], made
            assert len(servers()) == 1  # the other one had to make room
        made = local.create(LONG)  # of the version that was added last, whose server is not running
        wait_for(local, "processing", [made["id"]])
        kill_family(servers()[0].pid)
        assert local.wait(made["id"])["status"] == "failed"
        assert local.create({"count": 1}, wait=True)["status"] == "succeeded"
        assert len(servers()) == 1
        local.kill()
        assert len(servers()) == 1  # a leftover
        local.start()
        assert not servers()
        assert local.create({"count": 1}, wait=True)["status"] == "succeeded"
    assert not servers()


def test_a_killed_worker_costs_what_ran_and_nothing_else(tmp_path: Path) -> None:
    """The runtime survives its worker, and answers as if it were busy."""
    root = project(tmp_path / "echo")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("here")
    with Local(root, [("echo", f"folder:{weights}")], servers_at_once=2) as local:
        alone = local.create({"prompt": "shares", "count": 1}, wait=True)
        assert alone["output"] == ["raw:1"], "the only model has the GPU for itself"
        running = [local.create(LONG) for _ in range(SLOTS)]
        wait_for(local, "processing", [one["id"] for one in running])
        waiting = [local.create({"count": 2}) for _ in range(3)]
        [leader] = [
            process
            for process in psutil.process_iter(["cmdline", "cwd"])
            if "cog.server.http" in (process.info["cmdline"] or []) and process.info["cwd"] == str(root)
        ]
        [worker] = leader.children()
        worker.kill()
        for one in running:
            found = local.wait(one["id"])
            assert found["status"] == "failed"
            assert found["error"]
            assert found["error"].startswith(("The model's process ended", "The model server at"))
        for one in waiting:
            assert local.wait(one["id"], 60)["status"] == "succeeded"
        assert local.create({"count": 1}, wait=True)["status"] == "succeeded"


def test_two_do_not_share_a_folder(tmp_path: Path) -> None:
    settings = app.Settings(root=tmp_path, folder=tmp_path / "data", playground=Playground())
    app.build(settings)
    with pytest.raises(CogpressError, match="Another playground uses"):
        app.build(settings)


def test_prompts_are_kept_out_of_the_store(tmp_path: Path) -> None:
    with echoing(tmp_path / "echo") as cog:
        local = Local(cog.root, [("echo", cog.url)], options={"keep_prompts": False})
        with local:
            made = local.create({"prompt": "confidential-question", "count": 2}, wait=True)
            assert made["output"]
            failed = local.create({"prompt": "fail", "count": 2}, wait=True)
            assert failed["error"]
            assert local.get(made["id"])["output"]  # for a while, from memory
        for path in local.data.iterdir():
            assert not path.is_file() or b"confidential-question" not in path.read_bytes(), path
        with local:
            found = local.get(made["id"])
            assert (found["status"], found["input"], found["output"]) == ("succeeded", None, None)
            assert found["data_removed"] is True
            assert found["metrics"]["output_token_count"] == 2
            assert "bad things" not in local.get(failed["id"])["error"]


def test_what_is_old_or_too_much_is_removed(tmp_path: Path) -> None:
    with echoing(tmp_path / "echo") as cog:
        local = Local(cog.root, [("echo", cog.url)])
        with local:
            made = [local.create({"prompt": f"n{number}", "count": 1}, wait=True)["id"] for number in range(12)]
            local.ask("PUT", f"/playground/api/predictions/{made[0]}/rating", {"rating": "good", "note": ""})
        local.more["options"] = {"retention_count": 5}
        with local:
            left = [one["id"] for one in local.ask("GET", "/v1/predictions").json()["results"]]
            assert left == [*reversed(made[-5:]), made[0]]  # rated ones go by their age alone
            assert local.ask("GET", "/playground/api/history?q=n3").json()["total"] == 0
            gone = local.ask("GET", f"/v1/predictions/{made[3]}")
            assert gone.status_code == 404
        time.sleep(1)
        local.more["options"] = {"retention_days": 0.5 / 86400}
        with local:
            assert local.ask("GET", "/v1/predictions").json()["results"] == []
