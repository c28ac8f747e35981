"""Where a base comes from, and what is said when it can not."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cogpress import archive, base, manifest
from cogpress.errors import CogpressError


def test_embedded_base_is_a_normal_checkpoint_and_made_once(base_folder: Path, cache: Path) -> None:
    config = json.loads((base_folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["_name_or_path"] == "SmolLM2-135M-Instruct"
    assert base.tokenizer(base_folder).chat_template
    facts = manifest.read(base_folder)
    assert facts is not None
    manifest.check(base_folder, facts)
    before = (base_folder / "model.safetensors").stat().st_mtime_ns
    assert base.fetch("embedded", cache) == base_folder
    assert (base_folder / "model.safetensors").stat().st_mtime_ns == before


def test_no_file_of_the_embedded_base_names_this_machine(base_folder: Path) -> None:
    for path in base_folder.glob("*.json"):
        assert "site-packages" not in path.read_text(), path


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, r"no config\.json"),
        ({"config.json": "{}"}, r"no \.safetensors"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "pickle file.*save_pretrained"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, files: dict[str, str], said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CogpressError, match=said):
        base.fetch(str(tmp_path), tmp_path / "cache")


def test_a_name_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="is not a folder"):
        base.fetch("no/such/folder", tmp_path)
    with pytest.raises(CogpressError, match="hf://organisation/name"):
        base.fetch("hf://alone", tmp_path)
    with pytest.raises(CogpressError, match="can not be had from the Hub"):
        base.fetch("hf://organisation/name", tmp_path)  # the tests are offline


class _Files(http.server.SimpleHTTPRequestHandler):
    folder: Path

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, directory=str(self.folder), **kwargs)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path.startswith("/short"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"only this")
        else:
            super().do_GET()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "served").mkdir()
    handler = type("Handler", (_Files,), {"folder": tmp_path / "served"})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_download_is_whole_or_nothing(tmp_path: Path, web: str) -> None:
    (tmp_path / "served" / "a.tar").write_bytes(b"x" * 3_000_000)
    assert base.download(f"{web}/a.tar?signature=secret", tmp_path / "out" / "a.tar").stat().st_size == 3_000_000
    for path in ("short.tar", "missing.tar?signature=secret"):
        with pytest.raises(CogpressError) as error:
            base.download(f"{web}/{path}", tmp_path / "out" / "b.tar")
        assert "secret" not in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.tar"]


def test_a_tar_on_the_web_is_a_base(tmp_path: Path, web: str, tiny_base: Path) -> None:
    archive.pack(tiny_base, tmp_path / "served" / "base.tar")
    folder = base._checked(base._tar(f"{web}/base.tar", tmp_path / "cache"), "the tar")
    assert manifest.fingerprint(folder) == manifest.fingerprint(tiny_base)
    (tmp_path / "served" / "base.tar").unlink()
    assert base._tar(f"{web}/base.tar", tmp_path / "cache") == folder  # kept
