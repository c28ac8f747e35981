"""The stand-ins for tests of a push refuse what the real services would."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.standins.localreplicate import TOKEN
from tests.standins.pushproject import CLI_TOKEN, Machine, machine
from tests.standins.pushreplicate import PushReplicate

pytestmark = pytest.mark.slow

CAREFUL = {"COG_NO_UPDATE_CHECK": "1", "NO_COLOR": "1"}


@pytest.fixture
def here(tmp_path: Path, remote: PushReplicate, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return machine(tmp_path, remote.url, monkeypatch)


def cog(here: Machine, *arguments: str, text: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name}
    return subprocess.run(
        ["cog", *arguments],
        env={**environment, **CAREFUL, **more},
        cwd=here.root,
        input=text,
        capture_output=True,
        text=True,
    )


def test_what_is_not_careful_is_refused(here: Machine) -> None:
    assert cog(here, "--version").stdout.startswith("cog version")
    for arguments, more in [
        (["login", "--token", CLI_TOKEN], {}),
        (["login", "--token-stdin"], {"ANY": f"x{CLI_TOKEN}"}),
        (["login", "--token-stdin"], {"ANY": f"x{TOKEN}"}),
        (["login", "--token-stdin"], {"HF_TOKEN": "x"}),
        (["login", "--token-stdin"], {"NO_COLOR": ""}),
        (["login", "--token-stdin"], {"COG_NO_UPDATE_CHECK": "0"}),
        (["login"], {}),
        (["push", "local/test"], {}),
    ]:
        done = cog(here, *arguments, text=CLI_TOKEN, **more)
        assert (done.returncode, "VIOLATION" in done.stderr) == (97, True), arguments
    assert len(here.violations().splitlines()) == 8
    assert cog(here, "login", "--token-stdin", text="another").returncode == 1
    done = cog(here, "push", "r8.im/local/test")  # not logged in, which it finds when it has built
    assert (done.returncode, done.stderr.index("Building") < done.stderr.index("not logged in")) == (1, True)
    assert cog(here, "push", "r8.im/local/test", "--fast").returncode == 2
    assert cog(here, "push", "r8.im/local/test", "--progress", "pretty").returncode == 2


def test_a_project_that_cog_refuses_is_refused(here: Machine) -> None:
    assert 'unknown input "nope"' in cog(here, "run", "-i", "nope=1").stderr
    here.swap("        kind: str =", "        kind: Literal[1] =")
    for arguments in (["run", "-i", "nope=1"], ["push", "r8.im/local/test"]):
        done = cog(here, *arguments)
        assert (done.returncode, "unsupported type: Literal[...]" in done.stderr) == (1, True)
    assert 'unknown input "nope"' in cog(here, "train", "-i", "nope=1").stderr
    (here.root / "cog.yaml").write_text((here.root / "cog.yaml").read_text() + "predict: predict.py:Runner\n")
    assert "only one of run or predict" in cog(here, "train", "-i", "nope=1").stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [(f"{TOKEN}\n", "that looks like a Replicate API token"), ("  \n", "token is empty")],
    ids=["an API token", "nothing"],  # pytest puts the name of a test into the environment
)
def test_a_token_that_is_not_cogs_is_refused(here: Machine, given: str, says: str) -> None:
    done = cog(here, "login", "--token-stdin", text=given)
    assert (done.returncode, says in done.stderr) == (1, True)


def test_what_is_pushed_runs(here: Machine, remote: PushReplicate) -> None:
    assert cog(here, "login", "--token-stdin", text=f"{CLI_TOKEN}\n").returncode == 0
    assert "Unable to find" in cog(here, "push", "r8.im/local/first").stderr
    body = {"owner": "local", "name": "first", "visibility": "private", "hardware": "gpu-l40s"}
    assert remote.ask("POST", "/v1/models", body).status_code == 201
    done = cog(here, "push", "r8.im/local/first", "--separate-weights", "--progress", "plain")
    assert done.returncode == 0, done.stderr
    [version] = remote.ask("GET", "/v1/models/local/first/versions").json()["results"]
    assert f"  image  r8.im/local/first@sha256:{version['id']}" in done.stderr
    assert "count" in version["openapi_schema"]["components"]["schemas"]["Input"]["properties"]
    made: Any = remote.create({"prompt": "a", "count": 2}, "local/first", wait=True)
    assert (made["status"], made["output"]) == ("succeeded", ["a0 ", "a1 "])
    # Each push is a version of its own, that of the same image too.
    assert cog(here, "push", "r8.im/local/first").returncode == 0
    versions = remote.ask("GET", "/v1/models/local/first/versions").json()["results"]
    assert len({one["id"] for one in versions}) == 2
    assert versions[0]["openapi_schema"] == versions[1]["openapi_schema"]
    here.swap("default=3", "default=4")
    assert cog(here, "push", "r8.im/local/first").returncode == 0
    assert len(remote.ask("GET", "/v1/models/local/first/versions").json()["results"]) == 3
    # What .dockerignore keeps out is not there.
    (here.root / "predict.py").unlink()
    assert cog(here, "push", "r8.im/local/first").returncode == 1
    assert here.violations() == ""


def test_weights_in_a_layer_are_as_cogs(here: Machine, remote: PushReplicate) -> None:
    assert cog(here, "login", "--token-stdin", text=CLI_TOKEN).returncode == 0
    for name in ("one", "two"):
        body = {"owner": "local", "name": name, "visibility": "private", "hardware": "cpu"}
        assert remote.ask("POST", "/v1/models", body).status_code == 201
    here.enlarge("weights/model.safetensors")
    assert cog(here, "push", "r8.im/local/one", "--separate-weights").returncode == 0
    # What it keeps about the weights does not name the image.
    done = cog(here, "push", "r8.im/local/two", "--separate-weights")
    assert (done.returncode, "r8.im/local/two-weights:latest: not found" in done.stderr) == (1, True)
    assert cog(here, "push", "r8.im/local/one", "--separate-weights").returncode == 0
    # It makes a layer of what .dockerignore keeps out.
    here.enlarge("runs/demo/checkpoints/1/adapter.safetensors")
    done = cog(here, "push", "r8.im/local/one", "--separate-weights")
    assert (done.returncode, '"/runs/demo/checkpoints/1": not found' in done.stderr) == (1, True)
    assert cog(here, "push", "r8.im/local/one").returncode == 0


def test_faults_are_made_when_told(remote: PushReplicate) -> None:
    remote.asked()
    remote.fault("GET", "/v1/account", 429, 1, Retry_After="3")
    busy = remote.ask("GET", "/v1/account")
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "3")
    assert remote.ask("GET", "/v1/account").status_code == 200
    assert remote.changes() == []


def test_models_are_created(remote: PushReplicate) -> None:
    body = {"owner": "local", "name": "mine", "visibility": "private", "hardware": "cpu", "description": "d"}
    assert remote.ask("POST", "/v1/models", {**body, "hardware": "guess"}).status_code == 400
    assert remote.ask("POST", "/v1/models", {**body, "visibility": "x"}).status_code == 422
    assert remote.ask("POST", "/v1/models", {**body, "name": "../x"}).status_code == 422
    assert remote.ask("POST", "/v1/models", body).status_code == 201
    assert remote.ask("POST", "/v1/models", body).status_code == 409
    assert remote.ask("GET", "/v1/models/local/mine").json()["description"] == "d"
    answer = remote.ask("POST", "/v1/models/local/mine/predictions", {"input": {}})
    assert (answer.status_code, "no version" in answer.json()["detail"]) == (404, True)


def test_replicates_own_client_manages_it(here: Machine, remote: PushReplicate) -> None:
    replicate = pytest.importorskip("replicate", reason="requirements/dev.in lists Replicate's client")
    client = replicate.Client(base_url=remote.url, api_token=TOKEN)
    sku = client.hardware.list()[0].sku
    made = client.models.create("local", "by-client", visibility="private", hardware=sku)
    assert made.latest_version is None
    assert client.accounts.current().username == "local"
    pushed = {"model": "local/by-client", "root": str(here.root), "separate_weights": False}
    version = remote.ask("POST", "/standin/push", pushed).json()["id"]
    body: dict[str, Any] = {"name": "py", "model": "local/by-client", "version": version, "hardware": sku}
    body |= {"min_instances": 0, "max_instances": 1}
    assert client.deployments.create(**body).current_release.number == 1
    assert remote.ask("POST", "/v1/deployments", body).status_code == 409
    refused = remote.ask("DELETE", f"/v1/models/local/by-client/versions/{version}")
    assert (refused.status_code, "local/py uses this version" in refused.json()["detail"]) == (400, True)
    changed = client.deployments.update("local", "py", max_instances=3).current_release
    assert (changed.number, changed.configuration.max_instances) == (2, 3)
    for wrong in ({"max_instances": 21}, {"min_instances": 6}, {"max_instances": -1}):
        assert remote.ask("PATCH", "/v1/deployments/local/py", wrong).status_code == 422
    assert remote.ask("DELETE", "/v1/deployments/local/py").status_code == 400  # it may be running
    client.deployments.update("local", "py", max_instances=0)
    assert client.deployments.delete("local", "py")
    assert remote.ask("GET", "/v1/deployments/local/py").status_code == 404
