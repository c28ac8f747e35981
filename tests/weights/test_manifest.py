"""A folder's manifest covers every file that can change an answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from cogpress.errors import CogpressError
from cogpress.files import write_json
from cogpress.weights import manifest
from cogpress.weights.filenames import VERIFICATION


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "generation_config.json", "tokenizer.json", "more.safetensors", "a/b.py", "x.so"]
)
def test_a_file_that_is_not_listed_makes_the_weights_changed(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("weights")
    facts = manifest.write(tmp_path, "weights", {})
    write_json(tmp_path / VERIFICATION, {"passed": True, "checks": [], "files": manifest.signed_files(tmp_path)})
    (tmp_path / "README.md").write_text("for people")
    manifest.check(tmp_path, facts)
    assert (manifest.state(tmp_path), manifest.state(tmp_path, facts)) == ("verified", "verified")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert (manifest.state(tmp_path), manifest.state(tmp_path, facts)) == ("changed", "changed")
    with pytest.raises(CogpressError, match="which its manifest does not list"):
        manifest.check(tmp_path, facts)
