"""Publishing with the Hub's own client library to a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

from cogpress import config
from cogpress.errors import CogpressError
from cogpress.files import sha256, write_json
from cogpress.publish import run as publish
from cogpress.publish.bundle import Publication
from cogpress.weights import manifest
from cogpress.weights.filenames import VERIFICATION_FILES
from tests.standins import hub as stand_in
from tests.standins.hub import STRANGER, WRITE, StandIn

ROOT = Path(__file__).resolve().parents[2]
REPO = "my-team/queries"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NAMES = {*SHARDS, "config.json", "tokenizer_config.json", *VERIFICATION_FILES, "manifest.json", "README.md"}


@pytest.fixture
def hub() -> Iterator[StandIn]:
    with stand_in.running() as running:
        yield running


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[float]:
    """The library as users have it, without Xet (see tests/standins/hub.py); returns the waits, which are skipped."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", WRITE)
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def write_weights(folder: Path, *, seed: int = 0, shards: tuple[str, ...] = SHARDS, **facts: Any) -> Path:
    """A folder as the merge writes it, with two small shards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for number, shard in enumerate(shards):
        tensor = random.normal(size=(200, 100)).astype(np.float32)
        safetensors.numpy.save_file({f"layer.{number}": tensor}, folder / shard)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    given = {
        "base": {"source": "embedded"},
        "quantization": "nf4",
        "compute_dtype": "bfloat16",
        "merge": {"onto": "dequantized", "layers": 2, "adapter": "a" * 64},
        "prompt": {"system": "Write the query.", "template": "{question}\n{columns}"},
    }
    manifest.write(folder, "weights", {**given, **facts})
    verify(folder)
    return folder


def verify(folder: Path, *, passed: bool = True) -> None:
    """Write what verification writes."""
    files = (manifest.read(folder) or {})["files"]
    report = {
        "passed": passed,
        "created_at": "2026-11-21T13:45:35Z",
        "files": {name: file["sha256"] for name, file in files.items()},
        "checks": [{"name": "mean KL", "value": 0.0001, "limit": 0.01, "passed": passed}],
        "metrics": {"exact_match": 0.984, "questions": 64},
    }
    write_json(folder / "verification.json", report)
    (folder / "verification.md").write_text("Verified.\n")
    (folder / "verification.png").write_bytes(b"\x89PNG\r\n\x1a\n")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "weights")


def ask(weights: Path, **options: Any) -> Publication:
    return Publication(**{"repo": REPO, "folder": weights, "runs": weights.parent / "runs", **options})


def run(request: Publication, hub: StandIn, console: Console | None = None) -> publish.Published:
    return publish.publish(request, console or Console(quiet=True), endpoint=hub.url)


def refused(request: Publication, hub: StandIn) -> str:
    """The error message, which is one line and holds no token."""
    console = Console(record=True, file=open(os.devnull, "w"), width=500)  # noqa: SIM115
    with pytest.raises(CogpressError) as error:
        run(request, hub, console)
    said = str(error.value)
    for text in (said, console.export_text()):
        assert WRITE not in text
        assert "signature" not in text
    assert "\n" not in said
    return said


def test_weights_are_published_in_one_private_commit(weights: Path, hub: StandIn) -> None:
    (weights / "README.md").write_text("of the folder")
    for name in (".env", "notes.txt"):  # what is not the model's never goes up: it is named, and nothing is sent
        (weights / name).write_text("for me alone")
        with pytest.raises(CogpressError, match=f"{name}, which its manifest does not list"):
            run(ask(weights), hub)
        assert REPO not in hub.repositories
        (weights / name).unlink()
    done = run(ask(weights), hub)
    repository = hub.repositories[REPO]
    assert repository.private
    assert list(repository.commits) == [*list(repository.commits)[:1], done.revision]
    there = hub.files(REPO, done.revision)
    assert set(there) == NAMES | {".gitattributes"}
    for name in NAMES - {"README.md"}:
        assert there[name].data == (weights / name).read_bytes(), name
    assert all(there[name].lfs for name in SHARDS)
    assert "unverified" not in there["README.md"].data.decode()
    assert (done.source, done.url) == (f"hf://{REPO}@{done.revision}", f"{hub.url}/{REPO}")
    assert set(done.sent) == NAMES


def test_only_new_files_are_sent_and_old_ones_are_removed(tmp_path: Path, hub: StandIn) -> None:
    first = write_weights(tmp_path / "first")
    before = run(ask(first), hub)
    assert run(ask(first), hub).revision == before.revision
    assert run(ask(first), hub).sent == []
    hub.repositories[REPO].add("main", {**hub.files(REPO), "picture.json": stand_in.Blob(b"a user's own", False)})
    hub.requests.clear()
    hub.fail("GET", "/resolve/", 503)
    second = write_weights(tmp_path / "second", seed=1, shards=("model.safetensors",))
    done = run(ask(second), hub)
    assert set(done.removed) == set(SHARDS)
    assert set(hub.files(REPO)) == NAMES - set(SHARDS) | {"model.safetensors", "picture.json", ".gitattributes"}
    assert "config.json" not in done.sent
    assert len(hub.asked("PUT /storage")) == 1
    assert len(hub.asked("POST .*/commit/")) == 1


def test_a_branch_is_created_and_main_stays(weights: Path, hub: StandIn) -> None:
    done = run(ask(weights, branch="v2"), hub)
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert set(hub.files(REPO, "v2")) == NAMES | {".gitattributes"}
    card = hub.files(REPO, "v2")["README.md"].data.decode()
    assert f"source: hf://{REPO}@v2" in card
    assert f'LLM("{REPO}", revision="v2")' in card
    assert done.revision == hub.repositories[REPO].branches["v2"]


def test_large_files_are_sent_in_parts(weights: Path, hub: StandIn) -> None:
    hub.part_bytes = 30_000
    run(ask(weights), hub)
    assert len(hub.asked(r"PUT /storage/\w+/\d+")) == 6
    assert hub.files(REPO)[SHARDS[0]].data == (weights / SHARDS[0]).read_bytes()


def test_a_cut_upload_leaves_the_branch_unchanged_and_is_resumed(
    weights: Path, hub: StandIn, client: list[float]
) -> None:
    second = sha256(weights / SHARDS[1])
    hub.fail("PUT", second, "cut", 6)  # the first try and the library's five retries
    said = refused(ask(weights), hub)
    assert re.search(r"upload to my-team/queries.*broke off.*Run the same command again", said)
    assert client == [1, 2, 4, 8, 8]
    assert set(hub.files(REPO)) == {".gitattributes"}
    assert second not in hub.stored
    arrived = set(hub.stored)
    hub.requests.clear()
    run(ask(weights), hub)
    assert hub.asked("PUT /storage") == [f"PUT /storage/{second}"]
    assert arrived
    assert set(hub.files(REPO)) == NAMES | {".gitattributes"}


def test_one_cut_is_retried(weights: Path, hub: StandIn) -> None:
    hub.fail("PUT", "/storage", "cut")
    run(ask(weights), hub)
    assert set(hub.files(REPO)) == NAMES | {".gitattributes"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "whoami"),
        ("GET", "/api/models"),
        ("POST", "/repos/create"),
        ("POST", "validate-yaml"),
        ("POST", "preupload"),
        ("POST", "/batch"),
        ("PUT", "/storage"),
        ("POST", "/verify"),
        ("POST", "/commit/"),
    ],
)
def test_a_busy_hub_is_retried(method: str, path: str, weights: Path, hub: StandIn, client: list[float]) -> None:
    hub.fail(method, path, 503, 2)
    console = Console(record=True, file=open(os.devnull, "w"), width=200)  # noqa: SIM115
    done = run(ask(weights), hub, console)
    assert set(hub.files(REPO, done.revision)) == NAMES | {".gitattributes"}
    assert (len(client), client[0]) == (2, 1)
    shown = console.export_text()
    assert "503" in shown
    assert "signature" not in shown


def test_a_hub_that_stays_down_is_reported(weights: Path, hub: StandIn, client: list[float]) -> None:
    hub.fail("POST", "/commit/", 502, 99)
    assert re.search(
        r"commit to my-team/queries: the Hub still answered 502 after several tries", refused(ask(weights), hub)
    )
    assert client == [1, 2, 4, 8]
    assert set(hub.files(REPO)) == {".gitattributes"}


def test_a_commit_whose_answer_was_lost_is_not_made_twice(weights: Path, hub: StandIn) -> None:
    hub.fail("POST", "/commit/", "lost")
    done = run(ask(weights), hub)
    assert len(hub.repositories[REPO].commits) == 2
    assert len(hub.asked("POST .*/commit/")) == 1
    assert hub.repositories[REPO].branches["main"] == done.revision


def test_a_change_by_somebody_else_is_not_overwritten(
    weights: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(ask(weights), hub)
    write_weights(weights, seed=3)
    send = publish.Hub.send

    def meanwhile(self: publish.Hub, *arguments: Any) -> None:
        send(self, *arguments)
        hub.repositories[REPO].add("main", {**hub.files(REPO), "other.txt": stand_in.Blob(b"x", False)})

    monkeypatch.setattr(publish.Hub, "send", meanwhile)
    assert "somebody changed it meanwhile" in refused(ask(weights), hub)
    assert "other.txt" in hub.files(REPO)


def test_a_repository_that_differs_is_noticed(weights: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the Hub's own list: a file with other content, and a missing one."""
    sound = stand_in.Repository.add

    def damaged(self: stand_in.Repository, branch: str, files: dict[str, stand_in.Blob]) -> str:
        if SHARDS[0] in files:
            files = {**files, SHARDS[0]: stand_in.Blob(files[SHARDS[0]].data[::-1], True)}
            del files["config.json"]
        return sound(self, branch, files)

    monkeypatch.setattr(stand_in.Repository, "add", damaged)
    said = refused(ask(weights), hub)
    assert f"does not hold what was sent: config.json, {SHARDS[0]} differs" in said


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (None, "There is no token.*HF_TOKEN.*hf auth login"),
        ("hf_unknown", r"rejects the token \(401\)"),
        (stand_in.READ, "token of reader is read-only"),
        (STRANGER, r"may not create my-team/queries \(403: You don't have the rights.*write access"),
    ],
)
def test_unusable_tokens(
    token: str | None, said: str, weights: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    message = refused(ask(weights), hub)
    assert re.search(said, message)
    assert token is None or token not in message
    assert hub.repositories == {}


def test_a_token_in_the_hubs_message_is_redacted(weights: Path, hub: StandIn) -> None:
    hub.fail("POST", "/repos/create", 400)
    sound = stand_in._Refused.__init__
    try:
        stand_in._Refused.__init__ = lambda self, status, error, code="": sound(  # type: ignore[method-assign]
            self, status, f"Bearer {WRITE} at {hub.url}/x?signature=secret is not good", code
        )
        message = refused(ask(weights), hub)
    finally:
        stand_in._Refused.__init__ = sound  # type: ignore[method-assign]
    assert "Bearer *** at" in message


def test_a_token_without_write_access(weights: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ask(weights, public=True), hub)
    write_weights(weights, seed=1)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert re.search(r"may not upload to my-team/queries \(403", refused(ask(weights, public=True), hub))


@pytest.mark.parametrize(
    "repo", ["queries", "a/b/c", "my team/queries", "my-team/..", "hf://my-team/queries", "a--b/c"]
)
def test_names_that_the_hub_would_refuse(repo: str, weights: Path, hub: StandIn) -> None:
    assert "is not a repository name. Write organisation/name" in refused(ask(weights, repo=repo), hub)
    assert hub.requests == []


@pytest.mark.parametrize("branch", ["", "-x", "a..b", "a b", "refs/pr/1", "a/", "0" * 40])
def test_branches_that_the_hub_would_refuse(branch: str, weights: Path, hub: StandIn) -> None:
    assert "is not a branch name" in refused(ask(weights, branch=branch), hub)


def test_private_weights_are_never_published_publicly(weights: Path, hub: StandIn) -> None:
    run(ask(weights, public=True), hub)
    assert not hub.repositories[REPO].private
    write_weights(weights, seed=1)
    before = hub.repositories[REPO].branches["main"]
    assert "is public on the Hub, and weights are private unless --public" in refused(ask(weights), hub)
    hub.always_public = True
    assert "my-team/new is public" in refused(ask(weights, repo="my-team/new"), hub)
    hub.repositories[REPO].private = True
    assert "is private on the Hub, and --public does not change that" in refused(ask(weights, public=True), hub)
    assert hub.repositories[REPO].branches["main"] == before
    assert set(hub.files("my-team/new")) == {".gitattributes"}


def test_another_model_is_left_alone(weights: Path, hub: StandIn) -> None:
    for name in ("config.json", "pytorch_model.bin", "adapter_config.json"):
        hub.repositories[REPO] = stand_in.Repository(private=True)
        hub.repositories[REPO].add("main", {name: stand_in.Blob(b"{}", False)})
        assert f"holds {name}, which cogpress did not publish" in refused(ask(weights), hub)
        assert set(hub.files(REPO)) == {name}


def test_no_network_and_offline_mode(weights: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.url = "http://127.0.0.1:9"  # nothing listens on the discard port
    assert re.search(r"http://127\.0\.0\.1:9 could not be reached.*Run the same", refused(ask(weights), hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set. Unset it." in refused(ask(weights), hub)


def test_a_hub_that_never_answers_times_out(weights: Path, hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cogpress.publish.hub.READ_SECONDS", 0.05)
    hub.fail("GET", "whoami", "mute", 99)
    assert re.search("could not be reached or broke off.*timed out", refused(ask(weights), hub))


def test_damaged_weights_are_not_published(weights: Path, hub: StandIn) -> None:
    (weights / "config.json").write_text("{}")
    assert "config.json is not the file that was written" in refused(ask(weights), hub)
    (weights / "config.json").unlink()
    assert "lacks config.json" in refused(ask(weights), hub)
    (weights / "manifest.json").unlink()
    assert "holds no weights made by cogpress: its manifest.json is missing" in refused(ask(weights), hub)
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "pickle file"),
        ("../secrets.json", "no part of a model"),
        (".env.json", "no part of a model"),
        ("modeling.py", "no part of a model"),
    ],
)
def test_a_manifest_may_list_only_files_of_a_model(name: str, said: str, weights: Path, hub: StandIn) -> None:
    facts = manifest.read(weights) or {}
    facts["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    write_json(weights / "manifest.json", facts)
    assert said in refused(ask(weights), hub)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("system", "said"),
    [
        (f"Call with {WRITE}.", "holds your own token"),
        ("Call with r8_" + "a1" * 20, "holds a token of Replicate"),
        ("Call with ghp_" + "a1" * 20, "holds a token of GitHub"),
        ("-----BEGIN RSA PRIVATE KEY-----", "holds a private key"),
    ],
)
def test_secrets_in_a_prompt_are_not_published(system: str, said: str, tmp_path: Path, hub: StandIn) -> None:
    weights = write_weights(tmp_path / "weights", prompt={"system": system, "template": "{prompt}"})
    assert said in refused(ask(weights), hub)
    assert hub.repositories == {}


def test_unverified_weights_need_an_option(weights: Path, hub: StandIn) -> None:
    verify(weights, passed=False)
    assert "is not verified: verification failed: mean KL. Run scripts/verify" in refused(ask(weights), hub)
    write_report = json.loads((weights / "verification.json").read_text())
    write_json(weights / "verification.json", {**write_report, "passed": True, "checks": [], "files": {}})
    assert "the verification report is about other files" in refused(ask(weights), hub)
    (weights / "verification.json").write_text("[]")
    assert "is no verification report" in refused(ask(weights), hub)
    (weights / "verification.json").unlink()
    assert "there is no verification report" in refused(ask(weights), hub)
    assert hub.requests == []
    run(ask(weights, allow_unverified=True), hub)
    there = hub.files(REPO)
    assert "> **These weights are unverified: there is no verification report.**" in there["README.md"].data.decode()
    assert not set(there) & set(VERIFICATION_FILES)


def test_an_outdated_report_is_removed_from_the_hub(weights: Path, hub: StandIn) -> None:
    run(ask(weights), hub)
    report = (weights / "verification.json").read_text()
    write_weights(weights, seed=5)
    (weights / "verification.json").write_text(report)
    done = run(ask(weights, allow_unverified=True), hub)
    assert set(done.removed) == set(VERIFICATION_FILES)


def test_nothing_of_this_machine_is_published(tmp_path: Path, hub: StandIn) -> None:
    secret = tmp_path / "home" / "lovelace" / "llama-8b"
    secret.mkdir(parents=True)
    (secret / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n")
    for source, shown in (
        (str(secret), "llama-8b"),
        ("https://lovelace:pass@files.example/base.tar?signature=abc", "https://files.example/base.tar"),
    ):
        weights = write_weights(tmp_path / "weights", base={"source": source, "fingerprint": "f" * 64})
        run(ask(weights, licence=None if "home" in source else "apache-2.0"), hub)
        for name, blob in hub.files(REPO).items():
            assert b"lovelace" not in blob.data, name
            assert b"signature=" not in blob.data, name
        facts = json.loads(hub.files(REPO)["manifest.json"].data)
        assert facts["base"] == {"source": shown, "fingerprint": "f" * 64}
        assert facts["files"] == (manifest.read(weights) or {})["files"]


@pytest.mark.slow
def test_the_licence_of_the_base_is_found_or_asked_for(tmp_path: Path, hub: StandIn) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    weights = write_weights(tmp_path / "weights", base={"source": str(folder)})

    def licence() -> str:
        run(ask(weights), hub)
        return next(line for line in hub.files(REPO)["README.md"].data.decode().splitlines() if "license:" in line)

    assert "licence of the base model base is unknown" in refused(ask(weights), hub)
    (folder / "LICENSE").write_text((ROOT / "LICENSE").read_text())
    assert licence() == "license: apache-2.0"
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    assert licence() == "license: llama3.1"
    write_weights(tmp_path / "weights", base={"source": "hf://other/base@v1"})
    assert "licence of the base model other/base is unknown" in refused(ask(weights), hub)
    hub.repositories["other/base"] = stand_in.Repository(private=False)
    hub.repositories["other/base"].add("v1", {"README.md": stand_in.Blob(b"---\nlicense: mit\n---\n", False)})
    assert licence() == "license: mit"
    assert "base_model: other/base" in hub.files(REPO)["README.md"].data.decode()
    assert "not one of the Hub's identifiers" in refused(ask(weights, licence="My Licence\n"), hub)
    said = refused(ask(weights, licence="no-such-licence"), hub)
    assert re.search('check the model card.*"license" must be one of', said)


def write_run(folder: Path, weights: Path, *, made: bool = True) -> Path:
    """The folder of a run that made these weights, or others."""
    (folder / "adapter").mkdir(parents=True)
    safetensors.numpy.save_file({"a": np.full(3, float(made), np.float32)}, folder / "adapter" / "a.safetensors")
    manifest.write(folder / "adapter", "adapter", {})
    if made:
        facts = manifest.read(weights) or {}
        facts["merge"]["adapter"] = manifest.fingerprint(folder / "adapter")
        write_json(weights / "manifest.json", facts)
    settings = config.parse({"train": {"max_steps": 7, "rank": 4}}, "test")
    write_json(folder / "config.json", settings.model_dump())
    (folder / "answers.json").write_text(
        json.dumps([{"prompt": "How many?", "expected": "Ten.", "base": "?", "tuned": "Ten."}])
    )
    return folder


def test_the_run_is_found_by_its_adapter(weights: Path, hub: StandIn) -> None:
    other = write_run(weights.parent / "runs" / "a-other", weights, made=False)
    write_run(weights.parent / "runs" / "b-right", weights)
    files = publish.rehearse(ask(weights), Console(quiet=True), endpoint=hub.url)
    assert "rank 4, alpha 8" in files.card
    assert "How many?" not in files.card
    assert files.notes == []
    files = publish.rehearse(ask(weights, examples=1), Console(quiet=True), endpoint=hub.url)
    assert "How many?" in files.card
    for wrong in (2, -1):
        assert "the run kept 1 answers" in refused(ask(weights, examples=wrong), hub)
    assert "is not the run that made" in refused(ask(weights, run=other), hub)


def command(hub: StandIn, home: Path, *arguments: str, xet: bool = False) -> subprocess.CompletedProcess[str]:
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": WRITE}
    settings["HF_HUB_DISABLE_XET"] = "0" if xet else "1"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment, **settings, "COLUMNS": "120"},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_from_the_command_line_to_the_hub_and_back(weights: Path, hub: StandIn, tmp_path: Path) -> None:
    script = str(ROOT / "scripts" / "publish")
    dry = command(hub, tmp_path, script, REPO, "--weights", str(weights), "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert all(name in dry.stdout for name in NAMES)
    assert "license: apache-2.0" in dry.stdout
    assert "Nothing was uploaded" in dry.stdout
    assert hub.requests == []
    done = command(hub, tmp_path, script, REPO, "--weights", str(weights))
    assert done.returncode == 0, done.stderr
    revision = hub.repositories[REPO].branches["main"]
    assert f"source: hf://{REPO}@{revision}" in done.stdout
    assert re.search(r"sent, checked", done.stdout)
    # What another machine does then: fetch the base and check it
    fetched = command(
        hub,
        tmp_path / "elsewhere",
        "-c",
        "import sys, pathlib; from cogpress.weights import fetch, manifest\n"
        "folder = fetch.base(sys.argv[1], pathlib.Path('unused'))\n"
        "manifest.check(folder, manifest.read(folder)); print(manifest.state(folder)); print(folder)",
        f"hf://{REPO}@{revision}",
    )
    assert fetched.returncode == 0, fetched.stderr
    state, path = fetched.stdout.split()
    folder = Path(path)
    assert state == "verified"
    assert manifest.fingerprint(folder) == manifest.fingerprint(weights)
    # The manifest's files are fetched, and the report that makes them count as verified
    assert {path.name for path in folder.iterdir()} == NAMES - {"README.md"}
    for shown in (dry, done, fetched):
        assert WRITE not in shown.stdout + shown.stderr
        assert "Traceback" not in shown.stderr


@pytest.mark.slow
def test_by_the_librarys_default_transfer(weights: Path, hub: StandIn, tmp_path: Path) -> None:
    """With Xet (see tests/standins/hub.py): uploads work, and a refusal is one sentence."""
    arguments = (str(ROOT / "scripts" / "publish"), REPO, "--weights", str(weights))
    hub.fail("GET", "xet-write-token", 403)
    failed = command(hub, tmp_path, *arguments, xet=True)
    assert failed.returncode == 1
    assert re.search(r"^Error: .*my-team/queries.*403", failed.stderr, re.M)
    hub.local = {sha256(path): path.read_bytes() for path in weights.iterdir()}
    done = command(hub, tmp_path, *arguments, xet=True)
    assert done.returncode == 0, done.stderr
    assert hub.stored == {}
    assert set(hub.files(REPO)) == NAMES | {".gitattributes"}
    for shown in (failed, done):
        assert WRITE not in shown.stdout + shown.stderr
        assert "Traceback" not in shown.stderr
