"""Every source of a model gives a checked folder, or an error and the copy from before."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cogpress import http
from cogpress.errors import CogpressError
from cogpress.files import write_json
from cogpress.weights import archive, download, fetch, manifest, pget
from cogpress.weights.fetch import FetchedModel
from cogpress.weights.filenames import INDEX, VERIFICATION
from tests import wait_until
from tests.standins.fileserver import FileServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    monkeypatch.setattr(pget, "program", lambda: None)


def write_tensor(path: Path, size: int) -> None:
    """Write a safetensors file of one tensor of random bytes."""
    head = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + random.Random(0).randbytes(size))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that passes for a model as long as nobody computes with it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}" * 1000)
    write_tensor(folder / "model.safetensors", 5 << 19)
    manifest.write(folder, "base", {"source": {"package": "test"}})
    return folder


@pytest.fixture
def published(site: FileServer, small: Path) -> str:
    """The small model on a web server, as a folder and as a tar; the URL of the folder."""
    shutil.copytree(small, site.folder / "model")
    archive.pack(small, site.folder / "model.tar")
    return f"{site.url}/model"


def same(folder: Path, other: Path) -> bool:
    return manifest.hashes(folder) == manifest.hashes(other)


def test_a_folder_is_used_where_it_is(small: Path, tmp_path: Path) -> None:
    found = fetch.model(small, tmp_path / "cache")
    assert found.folder == small
    assert found.manifest == manifest.read(small)
    assert found.seconds["check"] > 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("inside", ["", "weights"])
def test_a_local_tar_is_unpacked_once(small: Path, tmp_path: Path, inside: str) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(small, whole / inside)
    tar = archive.pack(whole, tmp_path / "model.tar")
    found = fetch.model(tar, tmp_path / "cache")
    assert same(found.folder, small)
    before = (found.folder / "config.json").stat().st_mtime_ns
    assert fetch.model(str(tar), tmp_path / "cache").folder == found.folder
    assert (found.folder / "config.json").stat().st_mtime_ns == before
    os.utime(tar)
    assert fetch.model(tar, tmp_path / "cache").folder != found.folder, "the file is another"


@pytest.mark.parametrize("place", [".tar", "/manifest.json"])
def test_urls_are_fetched_once(small: Path, tmp_path: Path, site: FileServer, published: str, place: str) -> None:
    url = published + place + "?signature=secret"
    found = fetch.model(url, tmp_path / "cache")
    assert same(found.folder, small)
    assert {query for query, _, _ in site.log} == {"signature=secret"}
    before = (found.folder / "config.json").stat().st_mtime_ns
    site.log.clear()
    again = fetch.model(url, tmp_path / "cache")
    assert (again.folder, (again.folder / "config.json").stat().st_mtime_ns) == (found.folder, before)
    # The second request is for the verification report, which can be newer than the weights
    asked = 1 if place == ".tar" else 2
    assert len(site.log) == asked, "only whether it is still the same was asked"


@pytest.mark.slow
def test_a_published_folders_verification_report_is_fetched(
    small: Path, tmp_path: Path, site: FileServer, published: str
) -> None:
    def state() -> str:
        found = fetch.model(published + "/manifest.json", tmp_path / "cache")
        return manifest.state(found.folder, found.manifest)

    assert state() == "unverified"
    report = {"passed": True, "files": manifest.signed_files(small)}
    write_json(site.folder / "model" / VERIFICATION, report)
    assert state() == "verified", "though the weights were fetched before it was written"
    write_json(site.folder / "model" / VERIFICATION, {**report, "files": {"model.safetensors": "0" * 64}})
    assert state() == "changed"
    (site.folder / "model" / VERIFICATION).write_text("<html>")
    assert state() == "changed", "a page is no report"


@pytest.mark.parametrize("tells", ["weak ETag", "nothing"])
def test_a_new_tar_of_the_same_size_is_noticed(
    small: Path, tmp_path: Path, site: FileServer, published: str, tells: str
) -> None:
    def fetched(version: str) -> FetchedModel:
        site.headers = {"ETag": f'W/"{version}"'} if tells == "weak ETag" else {}
        return fetch.model(published + ".tar", tmp_path / "cache")

    site.etags = False
    old = fetched("1")
    assert fetched("1").folder == old.folder
    tar, changed = site.folder / "model.tar", tmp_path / "changed"
    size = tar.stat().st_size
    shutil.copytree(small, changed)
    (changed / "tokenizer.json").write_text("[]" * 1000)
    manifest.write(changed, "base", {"source": {"package": "test"}})
    archive.pack(changed, tar)
    assert tar.stat().st_size == size
    new = fetched("2")
    assert (new.folder / "tokenizer.json").read_text().startswith("[]")
    assert new.folder != old.folder
    site.busy = 1000
    assert fetched("2").folder == new.folder, "offline, the last one is used"


@pytest.mark.slow
@pytest.mark.parametrize("place", [".tar", "/manifest.json"])
def test_a_new_version_is_fetched_and_the_old_one_used_offline(
    small: Path, tmp_path: Path, site: FileServer, published: str, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = fetch.model(published + place, tmp_path / "cache").folder
    site.busy = 1000
    assert fetch.model(published + place, tmp_path / "cache").folder == old
    assert "fetched before" in capsys.readouterr().err
    site.busy = 0
    newer = site.folder / "model"
    (newer / "added.json").write_text("{}")
    manifest.write(newer, "base", {"source": {"package": "test"}})
    archive.pack(newer, site.folder / "model.tar")
    new = fetch.model(published + place, tmp_path / "cache").folder
    assert same(new, newer)
    assert same(old, small), "a server may be loading it"
    os.utime(old, (1, 1))
    os.utime(site.folder / "model.tar")
    manifest.write(newer, "base", {"source": {"package": "again"}})
    fetch.model(published + place, tmp_path / "cache")
    assert not old.exists()


@pytest.mark.slow
def test_a_damaged_cache_is_fetched_again(
    small: Path, tmp_path: Path, published: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fetch.model(published + "/manifest.json", tmp_path / "cache").folder
    weights = found / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert same(fetch.model(published + "/manifest.json", tmp_path / "cache").folder, small)
    assert "Fetching it again" in capsys.readouterr().err


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def flip(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES = [
    (cut, False, r"cut off or damaged"),
    (flip, True, r"not the file that was written"),
    (shard, False, r"lacks model-00002-of-00002\.safetensors, which model\.safetensors\.index\.json names"),
    (lambda folder: (folder / "model.safetensors").unlink(), False, r"no \.safetensors"),
    (lambda folder: (folder / "config.json").unlink(), False, r"no config\.json"),
    (lambda folder: (folder / "tokenizer.json").unlink(), True, r"lacks tokenizer\.json, which its manifest lists"),
    (lambda folder: (folder / INDEX).write_text("[]"), False, "not an index of shards"),
    (pickles, False, r"pytorch_model\.bin, a pickle file.*save_pretrained"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "listed", "said"), DAMAGES)
@pytest.mark.parametrize("kind", ["folder", "tar", "web tar"])
def test_incomplete_models_are_refused_and_the_last_good_one_stays(
    small: Path,
    tmp_path: Path,
    site: FileServer,
    damage: Callable[[Path], None],
    listed: bool,
    said: str,
    kind: str,
) -> None:
    shutil.copytree(small, tmp_path / "bad")
    if not listed:
        (tmp_path / "bad" / manifest.NAME).unlink()
    damage(tmp_path / "bad")
    tar = site.folder / "model.tar"
    archive.pack(small, tar)
    wanted = {"folder": str(tmp_path / "bad"), "tar": str(tar), "web tar": f"{site.url}/model.tar?secret"}[kind]
    good = None if kind == "folder" else fetch.model(wanted, tmp_path / "cache").folder
    archive.pack(tmp_path / "bad", tar)
    with pytest.raises(CogpressError, match=said) as error:
        fetch.model(wanted, tmp_path / "cache")
    assert "secret" not in str(error.value)
    assert ".part-" not in str(error.value), "the source is named, not a place that is gone"
    if good is not None:
        assert same(good, small)
        files = [path for path in good.parent.rglob("*") if path.is_file() and path.parent != good]
        assert [path.name for path in files if path.name != "lock"] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files: files["config.json"].update(sha256="0" * 64), "not the file that was written"),
        (lambda files: files["config.json"].update(bytes=5), r"config\.json has \d+ bytes, and the manifest says"),
        (lambda files: files["config.json"].update(bytes="5"), "without sha256 and bytes"),
        (lambda files: files["config.json"].pop("sha256"), "without sha256 and bytes"),
        (lambda files: files.update({"missing.json": files["config.json"]}), r"missing\.json: the server answered 404"),
        (lambda files: files.update({"../x.json": files["config.json"]}), "outside its folder"),
        (lambda files: files.update({"/x.json": files["config.json"]}), "outside its folder"),
        (lambda files: files.update({"x//y.json": files["config.json"]}), "without a plain name"),
        (lambda files: files.update({"x.pt": files["config.json"]}), "pickle file"),
        (
            lambda files: files.update({"compiled/a/model": files["config.json"]}),
            "compiled/a/model, which can run code",
        ),
        (lambda files: files.update({"notes.pdf": files["config.json"]}), r"'notes\.pdf', which is no file of a model"),
        (lambda files: files.update({"sub/a.json": files["config.json"]}), r"'sub/a\.json', which is no file of a mo"),
        (lambda files: files.clear(), "lists no files"),
    ],
)
def test_a_published_manifest_is_not_trusted(
    tmp_path: Path, site: FileServer, published: str, change: Callable[[dict[str, dict[str, object]]], None], said: str
) -> None:
    path = site.folder / "model" / manifest.NAME
    content = json.loads(path.read_text())
    change(content["files"])
    path.write_text(json.dumps(content))
    with pytest.raises(CogpressError, match=said):
        fetch.model(f"{published}/manifest.json", tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("model-*")) == []


def test_a_file_ends_where_the_manifest_says(
    tmp_path: Path, site: FileServer, published: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that tells no size cannot fill the disk."""
    site.chunked, site.ranges = True, False
    path = site.folder / "model" / manifest.NAME
    content = json.loads(path.read_text())
    content["files"]["model.safetensors"]["bytes"] = 2
    path.write_text(json.dumps(content))
    with pytest.raises(CogpressError, match=r"model\.safetensors sends more than its 2 bytes"):
        fetch.model(f"{published}/manifest.json", tmp_path / "cache")
    assert all(file.stat().st_size <= 2000 for file in (tmp_path / "cache").rglob("*.part")), "of the others at most"
    # Without a manifest, the disk's room is the bound.
    monkeypatch.setattr(download, "_LOOK", 1 << 20)
    real = shutil.disk_usage

    def usage(folder: Any) -> Any:
        return real(folder)._replace(free=1000) if site.asked("/model.tar") else real(folder)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(CogpressError, match="The download needs"):
        fetch.model(f"{published}.tar", tmp_path / "cache")


TAKEN = (
    *("README.md", "LICENSE", "vocab.txt", "verification.png", "additional_chat_templates/tool_use.jinja"),
    *("draft/table.safetensors", "adapter/adapter_config.json", "adapter/additional_chat_templates/tool_use.jinja"),
)
LEFT_OUT = (
    *("model", "model.onnx", "tokenizer.dat", "vocab.node", "verification.exe", "sub/config.json", "draft/x/a.json"),
    *("adapter/adapter/a.json", "torch_compile_cache/0a1b/rank_0_0/model", ".cache/huggingface/config.json"),
)


@pytest.mark.parametrize("inside", ["", "weights"])
@pytest.mark.parametrize("web", [False, True])
def test_only_files_of_known_names_are_taken_from_a_tar(
    small: Path, tmp_path: Path, site: FileServer, inside: str, web: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole" / inside
    shutil.copytree(small, whole)
    for name in (*TAKEN, *LEFT_OUT):
        (whole / name).parent.mkdir(parents=True, exist_ok=True)
        (whole / name).write_text("a")
    (whole / manifest.NAME).unlink()
    tar = archive.pack(tmp_path / "whole", site.folder / "model.tar")
    wanted = f"{site.url}/model.tar" if web else str(tar)
    found = fetch.model(wanted, tmp_path / "cache").folder
    here = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    assert here == {*TAKEN, "config.json", "tokenizer.json", "model.safetensors"}
    assert all(any(path.iterdir()) for path in found.rglob("*") if path.is_dir())
    assert re.search(r"Left out of .*model\.tar.*: .*adapter/adapter/a\.json.* and 5 more\.", capsys.readouterr().err)
    manifest.write(whole, "base", {})
    archive.pack(tmp_path / "whole", tar)
    with pytest.raises(CogpressError, match=r"lists '.*', which is no file of a model"):
        fetch.model(wanted, tmp_path / "cache")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("", "is empty"),
        ("no/such/folder", "is not a folder"),
        ("ftp://host/a.tar", "must be https"),
        ("http://example.com/a.tar?secret", r"^http://example\.com/a\.tar cannot be a source"),
        ("http://127.0.0.1.example.com/a.tar", "must be https"),
        ("https://", "must be https"),
        ("https://[::1/a.tar", "must be https"),
        ("hf://alone", "hf://organisation/name"),
        ("hf://a/b/c", "hf://organisation/name"),
        ("hf://a/../b", "hf://organisation/name"),
        ("pytorch_model.bin", "pickle file"),
    ],
)
def test_invalid_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CogpressError, match=said):
        fetch.model(wanted, tmp_path / "cache")


FETCH = """
import os, resource, sys
from pathlib import Path
from cogpress import cli
from cogpress.weights import download
from cogpress.weights import fetch
from cogpress.weights import pget
pget.program = lambda: None
download.SPARE = 0
if len(sys.argv) > 3:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
wanted = sys.argv[1], Path(sys.argv[2])
cli.run(lambda: print(fetch.tokenizer_folder(*wanted) if "ALONE" in os.environ else fetch.model(*wanted).folder))
"""


def process(*arguments: object, stderr: Any = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("place", [".tar", "/manifest.json"])
def test_concurrent_starts_download_once(
    small: Path, tmp_path: Path, site: FileServer, published: str, place: str
) -> None:
    site.hold = threading.Event()
    said = tmp_path / "said"
    with said.open("w") as file:
        starts = [process(published + place, tmp_path / "cache", stderr=file) for _ in range(4)]
    assert wait_until(lambda: said.read_text().count("waiting for it") == 3), said.read_text()
    site.hold.set()
    folders = {start.communicate()[0].strip() for start in starts}
    assert [start.returncode for start in starts] == [0] * 4, said.read_text()
    assert len(folders) == 1
    assert same(Path(folders.pop()), small)
    assert said.read_text().count("waiting for it") == 3
    asked = [(path, wanted) for _, path, wanted in site.log if wanted not in (None, "bytes=0-0")]
    assert asked
    assert len(asked) == len(set(asked)), "no byte was sent twice"


@pytest.mark.slow
@pytest.mark.parametrize("place", [".tar", "/manifest.json"])
def test_a_killed_start_is_resumed(small: Path, tmp_path: Path, site: FileServer, published: str, place: str) -> None:
    model = site.folder / "model"
    write_tensor(model / "model.safetensors", 24 << 20)
    manifest.write(model, "base", {})
    archive.pack(model, site.folder / "model.tar")
    site.delay = 0.02
    first = process(published + place, tmp_path / "cache")
    parts = (tmp_path / "cache").rglob
    assert wait_until(lambda: any(path.stat().st_size > 2 << 20 for path in parts("*.part")))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    largest = max(parts("*.part"), key=lambda path: path.stat().st_size)
    here = largest.stat().st_size
    site.delay = 0
    time.sleep(0.3)  # the server still answers the first process
    site.log.clear()
    found = fetch.model(published + place, tmp_path / "cache").folder
    assert same(found, model)
    name = "/model.tar" if place == ".tar" else "/model/model.safetensors"
    assert here > 2 << 20
    assert site.asked(name) == [f"bytes={here}-{(site.folder / name[1:]).stat().st_size - 1}"]
    left = {path.name for path in found.parent.iterdir()}
    assert left == {"lock", found.name}


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[bool]:
    """A file system of a few megabytes, where this machine allows one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("place", [".tar", "/manifest.json"])
@pytest.mark.parametrize("known", [True, False])
def test_a_full_disk_is_reported_and_nothing_is_left(
    tmp_path: Path, site: FileServer, published: str, place: str, known: bool
) -> None:
    """A size that the server or the manifest says is refused beforehand; else the kernel refuses to write."""
    megabytes = 1
    site.chunked = not known
    site.ranges = known
    with small_disk(tmp_path / "disk", megabytes) as mounted:
        cache = tmp_path / "disk" / "cache"
        limits = [] if mounted else [megabytes << 20]
        start = process(published + place, cache, *limits)
        _, err = start.communicate()
        assert start.returncode == 1
        if mounted and (known or place == "/manifest.json"):
            assert "Error: The download needs 0.0" in err
            assert not [path for _, path, wanted in site.log if wanted not in (None, "bytes=0-0")]
        else:
            assert "is full; the download was removed" in err
        assert [path.name for path in cache.rglob("*") if path.is_file() and path.name != "lock"] == []


class Hub:
    """What the Hub's client requests, as plain files of a web server."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, site: FileServer, home: Path) -> None:
        self.site, self.home = site, home
        self.files = site.folder / "org" / "name" / "resolve" / self.commit
        self.files.mkdir(parents=True)
        site.headers["X-Repo-Commit"] = self.commit

    def publish(self, folder: Path) -> None:
        shutil.copytree(folder, self.files, dirs_exist_ok=True)
        shutil.copytree(self.files, self.files.parent / "main", dirs_exist_ok=True)
        tree = [
            {"type": "file", "path": str(path.relative_to(folder)), "size": path.stat().st_size, "oid": "0" * 40}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        api = self.site.folder / "api" / "models" / "org" / "name"
        for place, content in (
            (api / "revision" / "main", {"id": "org/name", "sha": self.commit, "siblings": []}),
            (api / "tree" / self.commit, tree),
        ):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(content))

    def fetch(self, wanted: str = "hf://org/name", **variables: str) -> tuple[str, str]:
        """Fetch in a process of its own: the client reads its environment once."""
        done = subprocess.run(
            [sys.executable, "-c", FETCH, wanted, self.home / "cache"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "HF_HUB_OFFLINE": "0",
                "HF_HOME": str(self.home),
                "HF_ENDPOINT": self.site.url,
                "HF_TOKEN": "hf_secret",
                **variables,
            },
        )
        assert "hf_secret" not in done.stdout + done.stderr
        return done.stdout.strip(), done.stderr


@pytest.fixture
def hub(tmp_path: Path, site: FileServer) -> Hub:
    return Hub(site, tmp_path / "home")


@pytest.mark.slow
def test_from_the_hub_only_needed_files_are_fetched(tmp_path: Path, small: Path, hub: Hub) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(small, repository)
    (repository / manifest.NAME).write_text("{}")  # another program's
    (repository / "onnx").mkdir()
    for name in ("pytorch_model.bin", "consolidated.safetensors", "onnx/model.safetensors", "tokenizer.pkl", "a.png"):
        (repository / name).write_bytes(b"not to be fetched")
    templates = repository / "additional_chat_templates"
    (templates / "deeper").mkdir(parents=True)
    for name in ("tool_use.jinja", "run.py", "deeper/other.jinja"):
        (templates / name).write_text("a template")
    (repository / "vocab.txt").write_text("a")
    hub.publish(repository)
    alone, err = hub.fetch("hf://org/name@main", ALONE="the tokenizer")
    assert not list(Path(alone).glob("*.safetensors")), err
    assert (Path(alone) / "tokenizer.json").is_file()
    assert (Path(alone) / templates.name / "tool_use.jinja").is_file()
    out, err = hub.fetch("hf://org/name@main")
    named = (Path(out) / templates.name).rglob("*")
    assert [path.name for path in named] == ["tool_use.jinja"], err
    shutil.rmtree(Path(out) / templates.name)
    (Path(out) / "vocab.txt").unlink()
    names = {path.name for path in small.iterdir()} - {manifest.NAME}
    assert {path.name for path in Path(out).iterdir()} - {manifest.NAME} == names, err
    assert all((Path(out) / name).read_bytes() == (small / name).read_bytes() for name in names)
    # Offline, the copy from before is used
    assert hub.fetch("hf://org/name@main", HF_HUB_OFFLINE="1")[0] == out
    hub.site.busy = 10**6
    found, err = hub.fetch("hf://org/name@main", HF_ENDPOINT="http://127.0.0.1:1")
    assert found == out
    assert "Using the copy fetched before" in err


@pytest.mark.slow
def test_from_the_hub_the_manifests_files_are_fetched(tmp_path: Path, small: Path, hub: Hub) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(small, repository)
    (repository / "README.md").write_text("a card")
    hub.publish(repository)
    out, err = hub.fetch()
    assert same(Path(out), small), err
    flip(hub.files)
    shutil.rmtree(hub.home)
    out, err = hub.fetch()
    assert out == ""
    assert "not the file that was written" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pickles, "pytorch_model.bin, a pickle file"),
        (shard, "lacks model-00002-of-00002.safetensors, which its own list"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no .safetensors"),
    ],
)
def test_from_the_hub_unusable_models_are_refused_before_download(
    tmp_path: Path, small: Path, hub: Hub, change: Callable[[Path], None], said: str
) -> None:
    repository = tmp_path / "repository"
    shutil.copytree(small, repository)
    (repository / manifest.NAME).unlink()
    change(repository)
    hub.publish(repository)
    out, err = hub.fetch()
    assert out == ""
    assert said in " ".join(err.split())
    assert not any(path.endswith((".bin", ".safetensors")) for _, path, _ in hub.site.log)


@pytest.mark.slow
def test_from_the_hub_a_missing_model_is_one_sentence(hub: Hub) -> None:
    out, err = hub.fetch()
    assert out == ""
    assert "Error: Could not download hf://org/name from the Hub" in err
    assert "Traceback" not in err
