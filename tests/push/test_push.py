"""A whole push against the local Replicate over the real Cog runtime, with a stand-in for `cog`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from cogpress import config
from cogpress.cog.process import CPU_IMAGE, GPU_IMAGE, free_port
from cogpress.engines.base import CRASHED
from cogpress.errors import CogpressError
from cogpress.preflight import image, place
from cogpress.push import dry_run, journal, run, summary, testcases
from cogpress.push.context import build_context, code_beside_weights
from cogpress.push.target import PushTarget, fingerprint
from cogpress.replicate import routes
from cogpress.replicate.api import Replicate
from tests import Script
from tests.standins.localreplicate import ROOT, TOKEN, javascript
from tests.standins.preflightproject import for_cpus
from tests.standins.pushproject import CLI_TOKEN, Machine, machine
from tests.standins.pushreplicate import PushReplicate

pytestmark = pytest.mark.slow

PUSH = ["push", "r8.im/local/model", "--separate-weights", "--progress", "plain"]
TEST_PUSH = ["push", "r8.im/local/model-test", "--separate-weights", "--progress", "plain"]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[PushReplicate]:
    with PushReplicate(tmp_path / "replicate", options={"private_webhooks": True}) as made:
        yield made


@pytest.fixture
def here(tmp_path: Path, remote: PushReplicate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(place, "IMAGE_BYTES", 1000)
    made = machine(tmp_path, remote.url, monkeypatch)
    yield made
    assert made.violations() == ""
    # The tokens are in nothing that a push writes.
    for path in (made.root / "runs").rglob("*"):
        content = b"" if path.is_dir() else path.read_bytes()
        assert not [token for token in (TOKEN, CLI_TOKEN) if token.encode() in content], path


def push(here: Machine, dry: bool = False, **more: Any) -> tuple[Any, str]:
    """A push and its output in 80 columns."""
    settings = config.load(here.root / "model.yaml")
    file = StringIO()
    console = Console(file=file, width=80, highlight=False)
    target = PushTarget.of(here.root, settings, "local/model", **{"hardware": "gpu-l40s", **more})
    shipped = (dry_run.show if dry else run.push)(target, settings, console)
    assert not [token for token in (TOKEN, CLI_TOKEN) if token in file.getvalue()]
    return shipped, file.getvalue()


def before(shipped: Any) -> set[str]:
    """The steps that an earlier push did."""
    return {name for name, found in shipped.steps.items() if found["before"]}


def changing(text: str) -> set[str]:
    """The requests of a dry run that change something."""
    return set(re.findall(r"(?:POST|PATCH) /v1/[a-z]+", text))


def test_a_push_from_nothing_and_once_more(here: Machine, remote: PushReplicate) -> None:
    _, planned = push(here, dry=True)
    assert here.calls() == []
    assert remote.asked() == []
    assert not (here.root / "runs").exists()
    shipped, said = push(here, visibility="public")
    changes = remote.changes()
    # Each command and each kind of request is what the dry run told.
    calls = here.calls()
    assert calls == [["login", "--token-stdin"], TEST_PUSH, PUSH]
    flat = " ".join(planned.split())
    for arguments in calls:
        assert " ".join(["cog", *arguments]) in flat
    asked = {" /v1/".join((change.split()[0], change.split("/")[2])) for change in changes}
    assert asked == changing(planned) == {"POST /v1/models", "PATCH /v1/models", "POST /v1/predictions"}
    assert "fine-tuned with cogpress" in remote.ask("GET", "/v1/models/local/model").json()["readme"]
    assert len([one for one in changes if one == "POST /v1/predictions"]) == flat.count("POST /v1/predictions")
    models = {name: remote.ask("GET", f"/v1/models/local/{name}").json() for name in ("model", "model-test")}
    assert {name: found["visibility"] for name, found in models.items()} == {"model": "public", "model-test": "private"}
    assert models["model"]["latest_version"]["id"] == shipped.version
    assert {one["token"] for one in remote.asked()} <= {f"Bearer {TOKEN}"}
    for part in (shipped.version, f"{remote.url}/", "Test predictions", "import replicate", "this push"):
        assert part in said
    assert max(len(line) for line in said.splitlines() if "http" not in line and shipped.version not in line) <= 80
    content = json.loads((here.root / "runs" / "push" / "local--model" / "report.json").read_text())
    assert content["version"] == shipped.version
    assert "of weights and" in content["steps"][run.PREFLIGHT]["weights"]
    tests = shipped.steps[run.TESTS]
    # What the tests took: the predictions' own run times, at the price of the hardware.
    first, *_ = tests["outcomes"]
    assert 0 < first["waited"] == content["cold_boot"]
    assert tests["predict_seconds"] >= sum(one["metrics"]["predict_time"] for one in tests["outcomes"]) > 0.9
    spent = tests["predict_seconds"] + shipped.steps[run.FUZZ]["predict_seconds"]
    assert content["cost"] == {
        "seconds": pytest.approx(spent),
        "hardware": "gpu-l40s",
        "price_per_second": 0.000975,
        "dollars": pytest.approx(spent * 0.000975),
    }
    assert re.search(r"tests +\d+\.\d s, \$0\.\d{4} at gpu-l40s's price", said)
    assert re.search(r"cold boot +\d+\.\d s", said)
    assert all(found["seconds"] >= 0 for found in content["steps"].values())
    # Nothing has changed: nothing is built, pushed or predicted again.
    again, said = push(here)
    assert again.version == shipped.version
    assert (again.cost.seconds, again.cold_boot) == (0, shipped.cold_boot)
    assert here.calls() == []
    assert not [one for one in remote.changes() if "predictions" in one]
    assert {run.TEST_PUSH, run.TESTS, run.FUZZ, run.REAL_PUSH} <= before(again)
    assert "as before" in said
    assert push(here, dry=True)[1].count("done before") == 4


def test_programs_of_the_summary_run_as_they_are(here: Machine, remote: PushReplicate, tmp_path: Path) -> None:
    here.settings(deployment={"name": "live", "max_instances": 1})
    shipped, said = push(here)
    example = {"prompt": 'it\'s "so" $HOME `x` ü\n', "count": 2}
    programs = summary.programs("local/model", shipped, example, remote.url)
    expected = "".join(f"{example['prompt']}{number} " for number in range(2))
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}

    def output(command: list[str], **more: Any) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, **more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert output([sys.executable, "-c", programs["Python"]]) == expected
    for title in ("curl", "Deployment"):
        assert "".join(json.loads(output(["bash", "-c", programs[title]]))["output"]) == expected
    webhooks_are_received(programs["Webhook receiver"], remote, environment)
    stream = output(["bash", "-c", programs["HTTP stream"]])
    assert ("event: output" in stream, "event: done" in stream) == (True, True)
    # What is printed and written is those programs, with the example of model.yaml.
    programs_there = summary.programs("local/model", shipped, {"prompt": "hi", "count": 2}, remote.url)
    assert programs_there["Python"] in said
    written = (here.root / "runs" / "push" / "local--model" / summary.PROGRAMS).read_text()
    assert [title for title, program in programs_there.items() if f"\n{program}\n```" not in written] == []
    assert f"runs/push/local--model/{summary.PROGRAMS}" in said
    program = programs["JavaScript"].replace("new Replicate()", f'new Replicate({{ baseUrl: "{remote.url}/v1" }})')
    folder = javascript()
    assert output(["node", "--input-type=module", "-e", program], cwd=folder) == expected


def webhooks_are_received(program: str, remote: PushReplicate, environment: dict[str, str]) -> None:
    """The receiver takes what Replicate signed, and nothing else."""
    port = free_port("127.0.0.1")
    command = [sys.executable, "-c", program, str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}/", time.monotonic() + 60
            while True:
                try:
                    assert httpx.post(url, json={"id": "forged"}, trust_env=False).status_code == 401
                    break
                except httpx.ConnectError:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            made = remote.create({"prompt": "w", "count": 1}, "local/model", webhook=url)
            assert process.stdout is not None
            told = next(line for line in process.stdout if "succeeded" in line)
            assert told == f"{made['id']} succeeded ['w0 ']\n"
        finally:
            process.terminate()


def test_a_failing_test_stops_the_push_and_is_not_asked_again(here: Machine, remote: PushReplicate) -> None:
    here.settings(tests=[{"input": {"prompt": "hi", "count": 1}, "exact": "something else"}])
    with pytest.raises(CogpressError, match=r"1 of 1 test predictions failed .* 'hi0 ', not 'something else'"):
        push(here)
    assert here.calls() == [["login", "--token-stdin"], TEST_PUSH]  # not to the real one
    assert remote.ask("GET", "/v1/models/local/model/versions").json()["results"] == []
    remote.asked()
    with pytest.raises(CogpressError, match="failed before, and nothing that it depends on has changed"):
        push(here)
    assert here.calls() == []
    assert not [one for one in remote.changes() if "predictions" in one]
    # Other tests need no other image.
    here.settings(tests=[{"input": {"prompt": "hi", "count": 1}, "exact": "hi0 "}])
    shipped, _ = push(here)
    assert here.calls() == [PUSH]
    assert before(shipped) == {run.BESIDE, run.TEST_PUSH, run.PUSHED}


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ({"input": {"prompt": "a"}, "contains": ["a0", "b"]}, "'b' is not in"),
        ({"input": {"prompt": "a"}, "json_schema": {}}, "it is not JSON"),
        ({"input": {"prompt": "json"}, "json_schema": {"required": ["x"]}}, "'x' is a required property"),
        ({"input": {"prompt": "json"}, "expected": "{}"}, "task's score does not accept"),
        ({"input": {"prompt": "fail"}}, "it failed: ValueError: bad things happen"),
        ({"input": {"prompt": "fail"}, "error": "other"}, "another error"),
        ({"input": {"prompt": "a"}, "error": "x"}, "should have failed"),
        ({"input": {"prompt": "a", "count": 1}, "streams": True}, "in 1 piece"),
        ({"input": {"prompt": "a", "count": 5, "delay": 0.1}, "seconds": 0.2}, "more than 0.2 s"),
    ],
)
def test_what_a_test_asks_for_is_judged(pushed: Any, test: dict[str, Any], said: str) -> None:
    from cogpress.verify import run as verify

    replicate, version = pushed
    case = config.Case.model_validate(test)
    [outcome] = testcases.run(replicate, version, [case], verify.scorer("exact"), timeout=120, parallel=1)
    assert not outcome.passed
    assert said in outcome.message


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A running version, made once."""
    folder = tmp_path_factory.mktemp("pushed")
    with PushReplicate(folder / "replicate") as remote, pytest.MonkeyPatch.context() as patch:
        here = machine(folder, remote.url, patch)
        body = {"owner": "local", "name": "model", "visibility": "private", "hardware": "cpu"}
        assert remote.ask("POST", "/v1/models", body).status_code == 201
        made = remote.ask(
            "POST", "/standin/push", {"model": "local/model", "root": str(here.root), "separate_weights": 1}
        )
        yield Replicate(TOKEN, remote.url), made.json()["id"]


def test_a_prediction_that_does_not_end_is_canceled(pushed: Any) -> None:
    replicate, version = pushed
    case = config.Case(input={"count": 100000, "delay": 1})
    [outcome] = testcases.run(replicate, version, [case], str.__eq__, timeout=1, parallel=1)
    assert "did not end within 1 s and was canceled" in outcome.message
    assert replicate.wait(replicate.ask(routes.prediction(outcome.prediction)), 60)["status"] == "canceled"


def test_a_model_that_only_seems_to_stream_is_found(pushed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replicate, version = pushed
    real = Replicate.stream

    def late(self: Replicate, made: dict[str, Any], seconds: float) -> Any:
        self.wait(made, 60)
        yield from real(self, made, seconds)

    monkeypatch.setattr(Replicate, "stream", late)
    case = config.Case(input={"prompt": "s", "count": 10, "delay": 0.1}, streams=True)
    [outcome] = testcases.run(replicate, version, [case], str.__eq__, timeout=120, parallel=1)
    assert "after the prediction had ended" in outcome.message


def test_fuzz_finds_a_fault_of_the_program_and_takes_a_refusal(pushed: Any) -> None:
    from cogpress.push import fuzz

    replicate, version = pushed
    asked = [{"prompt": "broken"}, {"prompt": "fail"}, {"prompt": "fine", "count": 1}, {"count": 0}]
    found = fuzz.run(replicate, version, asked, timeout=120, parallel=2)
    assert [outcome.passed for outcome in found] == [False, True, True, False]
    assert "KeyError" in found[0].message
    assert "its own schema rejects it" in found[3].message


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        ("Async prediction failed: IndexError: list index out of range", "IndexError"),
        ("Failed to send request: channel closed", "Failed to send request"),
        ("Worker crashed", "Worker crashed"),
        ("Async prediction failed: ", "Async prediction failed"),
        ("", "nothing at all"),
        ("Async prediction failed: CogpressError: stop may have at most 16 texts.", None),
        ("Prediction failed: ValueError: too long", None),
        ("Prediction failed: Async prediction failed: reason: stop may have at most 16 texts.", None),
        (f"Prediction failed: Async prediction failed: reason: {CRASHED}", "it crashed"),
    ],
)
def test_fuzz_tells_a_crash_from_a_refusal(error: str, fault: str | None) -> None:
    from cogpress.push import fuzz

    found = fuzz._fault({"status": "failed", "error": error})
    assert (found is None) == (fault is None)
    assert (fault or "") in (found or "")


def test_breaking_changes_block_unless_allowed(here: Machine, remote: PushReplicate) -> None:
    push(here)
    here.calls()
    here.swap("le=100000)", "le=50)")
    here.swap('default="word"', 'default="other"')
    here.settings(tests=[])
    said = r"Breaking changes for callers of local/model: .*default 'other' instead of 'word'; input count has the max"
    with pytest.raises(CogpressError, match=said):
        push(here)
    assert here.calls() == []  # found before anything is built
    shipped, text = push(here, allow_breaking=True)
    assert here.calls() == [TEST_PUSH, PUSH]
    assert "maximum 50" in " ".join(text.split())
    assert shipped.steps[run.BESIDE]["breaking"]


def test_what_preflight_finds_stops_the_push(here: Machine, remote: PushReplicate) -> None:
    (here.root / "weights" / "model.safetensors").write_text("changed")
    with pytest.raises(CogpressError, match=r"Preflight found 2 problems"):
        push(here)
    assert here.calls() == []
    assert remote.changes() == []


def test_a_push_goes_on_where_it_stopped(here: Machine, remote: PushReplicate) -> None:
    here.standin(fail="no space left on device")
    with pytest.raises(CogpressError, match=r"(?s)exit status 1.*no space left on device.*All of it is in"):
        push(here)
    here.standin(fail=None)
    calls = here.calls()
    assert calls[-1] == TEST_PUSH
    remote.fault("POST", "/v1/predictions", 400)
    with pytest.raises(
        CogpressError, match=r"Replicate answers 400 \(request for a prediction .*\): the stand-in was told to"
    ):
        push(here)
    assert here.calls() == [TEST_PUSH]
    shipped, _ = push(here)
    assert here.calls() == [PUSH]
    assert run.TEST_PUSH in before(shipped)
    # A version that was deleted meanwhile is pushed again.
    remote.ask("DELETE", f"/v1/models/local/model/versions/{shipped.version}")
    push(here)
    assert here.calls() == [PUSH]
    _, _ = push(here, fresh=True)
    assert here.calls() == [TEST_PUSH, PUSH]


def test_busy_answers_are_waited_for(here: Machine, remote: PushReplicate, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.fault("POST", "/v1/predictions", 429, 2, Retry_After="0")
    remote.fault("GET", "/v1/predictions", 503, 2, Retry_After="0")
    remote.fault("POST", "/v1/models", 500, 1, Retry_After="0")
    shipped, _ = push(here)
    assert shipped.version


def test_a_version_is_found_without_a_digest(here: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "LARGE_WEIGHTS", 10)
    here.standin(silent=True)
    shipped, said = push(here)
    assert shipped.version
    # Weights that are too large for an image are told at the end too.
    assert "set push.weights to fetched" in " ".join(said.split())


def test_a_project_that_changes_while_it_is_tested_is_not_pushed(
    here: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run.PushRun._fuzz

    def change(self: run.PushRun, *given: Any) -> None:
        real(self, *given)
        here.swap("default=3", "default=4")

    monkeypatch.setattr(run.PushRun, "_fuzz", change)
    with pytest.raises(CogpressError, match="changed during the push"):
        push(here)
    assert PUSH not in here.calls()


def test_a_deployment_is_made_and_then_changed(here: Machine, remote: PushReplicate) -> None:
    here.settings(deployment={"name": "live", "max_instances": 2}, tests=[], fuzz={"rounds": 0})
    _, planned = push(here, dry=True)
    assert {"POST /v1/deployments", "PATCH /v1/deployments"} <= changing(planned)
    shipped, _ = push(here)
    found = remote.ask("GET", "/v1/deployments/local/live").json()["current_release"]
    assert (found["version"], found["configuration"]["max_instances"]) == (shipped.version, 2)
    assert found["configuration"]["hardware"] == "gpu-l40s"
    again, _ = push(here)
    assert run.DEPLOYMENT in before(again)
    # What somebody changed there stays, but for what model.yaml names; an old test version goes where that is asked.
    remote.ask("PATCH", "/v1/deployments/local/live", {"hardware": "gpu-t4", "min_instances": 1})
    here.swap("default=3", "default=4")
    newer, _ = push(here, allow_breaking=True, clean=True)
    found = remote.ask("GET", "/v1/deployments/local/live").json()["current_release"]
    assert (found["version"], found["number"]) == (newer.version, 3)
    assert found["configuration"] == {"hardware": "gpu-t4", "min_instances": 1, "max_instances": 2}
    assert newer.steps[run.CLEAN]["deleted"] == 1
    assert len(remote.ask("GET", "/v1/models/local/model-test/versions").json()["results"]) == 1


def test_the_image_for_cpus_is_pushed_as_any_other(here: Machine) -> None:
    here.settings(tests=[], fuzz={"rounds": 0})
    for_cpus(here.root)
    _, planned = push(here, dry=True, hardware="auto", cpu=True)
    assert "scripts/preflight local/model --cpu" in planned
    assert set(re.findall(r'"hardware":\s+"(.*?)"', planned)) == {"cpu"}
    here.standin(no_cache=True)  # Docker's cache lost a layer between the two pushes
    shipped, said = push(here, hardware="auto", cpu=True)
    assert here.calls() == [["login", "--token-stdin"], TEST_PUSH, PUSH]
    assert shipped.cost.hardware == "cpu"
    assert "1 of the image's 2 layers were built anew after the tests" in " ".join(said.split())
    with build_context(here.root, here.root / "runs", CPU_IMAGE) as place:
        assert (place / "cog.yaml").read_text() == (ROOT / CPU_IMAGE).read_text()
        assert not (place / CPU_IMAGE).exists()
    # Either image is pushed again for what is its own, and no other.
    settings = config.load(here.root / "model.yaml")
    before = {name: fingerprint(here.root, settings, name) for name in (GPU_IMAGE, CPU_IMAGE)}
    (here.root / CPU_IMAGE).write_text((here.root / CPU_IMAGE).read_text() + "# changed\n")
    after = {name: fingerprint(here.root, settings, name) for name in (GPU_IMAGE, CPU_IMAGE)}
    assert after[GPU_IMAGE] == before[GPU_IMAGE] != before[CPU_IMAGE] != after[CPU_IMAGE]


def test_weights_in_a_layer_are_pushed_under_both_names(here: Machine) -> None:
    here.settings(tests=[], fuzz={"rounds": 0})
    left = ["runs/demo/checkpoints/1/adapter.safetensors", ".cache/bases/embedded/model.safetensors"]
    here.enlarge("weights/model.safetensors", *left)
    shipped, said = push(here)
    assert here.calls() == [["login", "--token-stdin"], TEST_PUSH, PUSH]
    assert "no layer of their own" not in said
    # What ships has the layers of what was tested.
    layers = shipped.steps[run.TEST_PUSH]["layers"]
    assert layers == shipped.steps[run.REAL_PUSH]["layers"]
    assert f"with the 2 layers that were tested (the last is {layers[-1][:19]})" in " ".join(said.split())
    assert not list((here.root / "runs" / "push").rglob("context"))
    assert not (here.root / ".cog").exists()


def test_the_build_context_holds_what_enters_the_image(here: Machine, tmp_path: Path) -> None:
    here.enlarge("weights/model.safetensors", "runs/demo/adapter.safetensors", ".cog/cache/weights_manifest.json")
    with (here.root / ".dockerignore").open("a") as file:
        file.write("requirements\n")
    with build_context(here.root, tmp_path / "made") as place:
        files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
        # Cog itself reads the requirements.
        assert {"cog.yaml", ".dockerignore", "requirements/gpu.lock", "weights/model.safetensors"} <= files
        assert not [name for name in files if name.startswith(("runs/", ".cog/", ".git/")) or name.endswith(".in")]
        assert (place / "weights" / "model.safetensors").samefile(here.root / "weights" / "model.safetensors")
    assert not place.exists()
    assert (here.root / "weights" / "model.safetensors").stat().st_size == 12_000_000
    assert code_beside_weights(here.root) == []
    (here.root / "weights" / "tool.py").write_text("")
    assert code_beside_weights(here.root) == ["weights/tool.py"]


def test_weights_that_are_fetched_at_the_start_are_in_no_layer(here: Machine) -> None:
    settings = config.load(here.root / "model.yaml")
    here.settings(weights="fetched")
    settings = config.load(here.root / "model.yaml")
    with pytest.raises(CogpressError, match="would enter the image"):
        fingerprint(here.root, settings)
    (here.root / ".dockerignore").write_text((here.root / ".dockerignore").read_text() + "weights\n")
    with pytest.raises(CogpressError, match="names no URL"):
        fingerprint(here.root, settings)
    serve = config.Serve(weights="https://example.com/manifest.json")
    fingerprint(here.root, settings.model_copy(update={"serve": serve}))
    from cogpress.cog import program as cog

    assert "--separate-weights" not in cog.command("a/b", settings.push)
    assert "--separate-weights" not in cog.command("a/b", config.Push(weights="image"))


def test_the_command(here: Machine, remote: PushReplicate, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["push", "--project", here.root]
    status, out, error = script(*command, "local/model", "--dry-run")
    assert status == 0, error
    assert "cog push r8.im/local/model-test" in out
    status, _, error = script(*command, "local/model", "--test-model", "local/model")
    assert (status, "local/model cannot be its own test model" in error) == (1, True)
    status, _, error = script(*command, "model")
    assert (status, "is not owner/name" in error) == (1, True)
    monkeypatch.delenv("REPLICATE_API_TOKEN")
    status, _, error = script(*command, "local/model")
    assert (status, "REPLICATE_API_TOKEN is not set" in error) == (1, True)
    assert here.calls() == []
    assert remote.changes() == []


def test_answers_are_compared_with_the_live_versions(here: Machine) -> None:
    tests = [{"input": {"prompt": "hi", "count": 2}}, {"input": {"prompt": "json"}, "name": "as JSON"}]
    here.settings(tests=tests, fuzz={"rounds": 0})
    assert run.SAME not in push(here)[0].steps  # nothing was live
    here.swap("{{prompt}}{{number}} ".replace("{{", "{").replace("}}", "}"), "{prompt}-{number} ")
    shipped, said = push(here)
    assert shipped.steps[run.SAME]["other"] == ["1: no error"]
    assert "Answers differ from the previous version's: 1: no error." in " ".join(said.split())
    here.settings(tests=tests, fuzz={"rounds": 0}, same_answers=True)
    here.swap("{prompt}-{number} ", "{prompt}+{number} ")
    with pytest.raises(CogpressError, match=r"answers differently from the live version \w+: 1: no error"):
        push(here)


def test_a_journal_that_is_damaged_counts_as_nothing_done(tmp_path: Path) -> None:
    path = tmp_path / "journal.json"
    made = journal.Journal(path)
    made.note("a", "key", 1.0, {"x": 1})
    assert journal.Journal(path).find("a", "key") is not None
    assert journal.Journal(path).find("a", "other") is None
    assert journal.Journal(path, fresh=True).find("a", "key") is None
    for text in ("", "[]", '{"format": 2, "steps": {}}', '{"format": 1, "steps": {"a": {}}}'):
        path.write_text(text)
        assert journal.Journal(path).find("a", "key") is None


def test_hardware_is_the_plans(here: Machine) -> None:
    settings = config.load(here.root / "model.yaml")
    target = PushTarget.of(here.root, settings, "local/model")
    with pytest.raises(CogpressError, match="The plan cannot choose hardware"):
        target.sku(settings)
    llama = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama |= {"architectures": ["LlamaForCausalLM"], "vocab_size": 100, "intermediate_size": 128}
    (here.root / "weights" / "config.json").write_text(json.dumps(llama))
    assert target.sku(settings) in ("gpu-t4", "gpu-l40s")  # what the account has
    assert target.sku(settings, ask=False).startswith("gpu-")
    assert PushTarget.of(here.root, settings, "a/b", hardware="cpu").sku(settings) == "cpu"
