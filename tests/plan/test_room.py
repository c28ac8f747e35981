"""What a training and all that follows it take of disk and memory, and that too little is refused before step 1."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from bench import bases
from cogpress import config, pipeline
from cogpress.errors import CogpressError
from cogpress.plan import memory, room
from cogpress.plan import report as plan_report
from cogpress.plan.room import Room
from cogpress.prompts import Row
from cogpress.train import layers
from cogpress.train import run as training
from cogpress.verify import distributions
from cogpress.weights import base
from tests.standins.architectures import LLAMA3, SMOLLM2

GB = 10**9
LARGE = Room(weights=16 * GB, adapter=GB, corrections=0, draft=0, stored=4 * GB, memory=20 * GB)


def settings(**sections: Any) -> config.Config:
    return config.parse(sections, "the test")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets what every disk has free."""
    real = shutil.disk_usage

    def set_(count: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: real(folder)._replace(free=int(count)))

    return set_


def test_an_architecture_is_counted_as_its_files_are() -> None:
    found = room.of_architecture(SMOLLM2, settings(train={"rank": 32}), {})
    assert found.weights == pytest.approx(1.01 * 269_060_552, rel=0.001), "its merged weights, as they are on a disk"
    assert found.adapter == 4 * 9_768_960
    assert found.corrections == 0
    # Every row as long as allowed, unless a run has counted them.
    short = room.of_architecture(SMOLLM2, settings(train={"max_length": 128}), {})
    assert short.stored == 64 * 128 * 49_152 * 4
    counted = {"train": 90, "validation": 10, "learnt_tokens": 2_000}
    assert room.of_architecture(SMOLLM2, settings(), counted).stored == 64 * 20 * 49_152 * 4
    long = room.of_architecture(LLAMA3, settings(train={"max_length": 8192}), {})
    assert long.stored == distributions.STORED_BYTES + 2048 * 128_256 * 4, "no more is stored at once"
    balanced = room.of_architecture(SMOLLM2, settings(merge="balanced"), {})
    assert balanced.corrections == 4 * 2 * 106_168_320
    assert room.of_architecture(SMOLLM2, settings(merge="balanced", base={"quantization": "none"}), {}).corrections == 0


def test_the_moment_that_takes_most_counts() -> None:
    assert sum(LARGE.largest(tar=False).values()) == 21 * GB
    assert sum(LARGE.largest(tar=False, stored=False).values()) == 17 * GB
    assert sum(LARGE.largest(tar=True).values()) == 38 * GB
    assert sum(LARGE.largest(tar=False, copy=True).values()) == 33 * GB, "the stored log-probabilities are gone by then"
    # Earlier weights and their tar go before the new tar is written, and after the new weights are.
    assert sum(LARGE.largest(tar=True, freed=10 * GB).values()) == 28 * GB
    assert sum(LARGE.largest(tar=True, freed=32 * GB).values()) == 17 * GB
    # Three checkpoints of an adapter that is larger than its base.
    assert sum(Room(GB, GB, 0, 0, 0, 0).largest(tar=False).values()) == 10 * GB
    balanced = Room(16 * GB, GB, 60 * GB, 0, 4 * GB, 0)
    assert sum(balanced.largest(tar=False).values()) == 81 * GB


def test_too_little_disk_is_refused_with_the_numbers(tmp_path: Path, free: Callable[[float], None]) -> None:
    free(30 * GB)
    LARGE.check(tmp_path / "runs" / "new", tar=False)
    with pytest.raises(CogpressError) as error:
        LARGE.check(tmp_path / "runs" / "new", tar=True)
    assert str(error.value) == (
        f"The training and what follows it take 38.0 GB in {tmp_path}/runs/new (the tar 17.0 GB, the weights 16.0 GB, "
        "the comparison's log-probabilities 4.00 GB, the adapter 1.00 GB), and 30.0 GB are free there. Free some, or "
        "name a folder on another disk with --run."
    )
    # What the new weights replace is free by then.
    (tmp_path / "weights").mkdir()
    with (tmp_path / "weights" / "model.safetensors").open("wb") as file:
        file.truncate(9 * GB)
    LARGE.check(tmp_path, tar=True, replaced=[tmp_path / "weights", tmp_path / "weights.tar"])


def test_temporary_files_may_be_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Path("/dev/shm")
    if shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has one disk")
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    real, left = shutil.disk_usage, {shared: 5 * GB}
    monkeypatch.setattr(shutil, "disk_usage", lambda at: real(at)._replace(free=left.get(Path(at), 18 * GB)))
    LARGE.check(tmp_path, tar=False)
    left[shared] = 3 * GB
    with pytest.raises(CogpressError, match=r"stores 4\.00 GB in /dev/shm, and 3\.00 GB are free there.*TMPDIR"):
        LARGE.check(tmp_path, tar=False)


def test_too_little_memory_for_the_comparison_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]
) -> None:
    free(1000 * GB)
    real = psutil.virtual_memory()
    monkeypatch.setattr(room, "_CGROUP", tmp_path / "memory.max")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=21 * GB))
    assert LARGE.check(tmp_path, tar=False) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert LARGE.check(tmp_path, tar=False) is None
    (tmp_path / "memory.max").write_text(f"{12 * GB}\n")
    said = str(LARGE.check(tmp_path, tar=False))
    assert said.startswith("The comparison after the training takes about 20.0 GB of memory, and 12.0 GB are free")
    assert "scripts/verify" in said


@pytest.mark.slow
def test_a_training_without_room_is_refused_before_anything_is_trained_or_removed(
    examples_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]
) -> None:
    folder, run = bases.make("llama", tmp_path / "base"), tmp_path / "run"
    asked = settings(base={"source": str(folder)}, train={"max_steps": 1, "rank": 2, "evaluations": 0})
    monkeypatch.setattr(training, "_open_run", lambda *_: pytest.fail("training began"))
    free(1000)
    with pytest.raises(CogpressError, match=r"and what follows it take 0\.\d\d GB in .*run \(.*and 0\.00 GB are free"):
        pipeline.build(asked, examples_file, run, tmp_path / "cache", Console(quiet=True))
    # Where the weights are copied to weights/ in the end, that counts.
    taken = room.of_files(folder, layers.choose(folder, "all-linear", "nf4"), asked, [])
    free(sum(taken.largest(tar=False).values()) + taken.weights / 2)
    (tmp_path / "model.yaml").write_text(json.dumps(asked.model_dump(mode="json", exclude_defaults=True)))
    given = {"train_data": str(examples_file)}
    with pytest.raises(CogpressError, match=r"their copy 0\.0"):
        pipeline.from_inputs(tmp_path, given, install_too=True, console=Console(quiet=True))
    # A warning about memory does not keep it from beginning.
    free(1000 * GB)
    monkeypatch.setattr(room, "_free_memory", lambda: 0.0)
    console = Console(file=io.StringIO(), width=400)

    class _Begun(Exception):
        pass

    def begun(*_: Any) -> None:
        raise _Begun

    monkeypatch.setattr(training, "_open_run", begun)
    with pytest.raises(_Begun):
        pipeline.build(asked, examples_file, run, tmp_path / "cache", console)
    assert "of memory, and 0.00 GB are free" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_files_are_counted_as_they_are_written(tmp_path: Path) -> None:
    folder = bases.make("llama", tmp_path / "base")
    size = (folder / "model.safetensors").stat().st_size  # in 32 bits
    rows = [Row(list(range(5, 25)), [-100] * 12 + list(range(17, 25))) for _ in range(3)]

    def counted(targets: str = "all-linear", **sections: Any) -> Room:
        chosen = layers.choose(folder, targets, "nf4")
        return room.of_files(folder, chosen, settings(train={"rank": 2}, **sections), rows)

    model = base.load(folder, "none")
    found = counted()
    assert found.weights == pytest.approx(1.01 * size / 2, rel=0.01)
    assert found.adapter == 4 * sum(2 * sum(one.weight.shape) for one in layers_of(model))
    corrected = counted(merge="balanced").corrections
    assert corrected == 2 * 4 * sum(one.weight.numel() for one in layers_of(model))
    with tempfile.TemporaryDirectory(dir=tmp_path) as place:
        distributions._stored(lambda: model, [[0, 1, 2]], rows, 0, Path(place), lambda: None)
        stored = sum(file.stat().st_size for file in Path(place).iterdir())
    assert found.stored == pytest.approx(stored, abs=128), "but a header for each batch"


def layers_of(model: Any) -> list[Any]:
    import torch

    return [one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"]


@pytest.mark.slow
def test_a_plan_says_what_a_training_here_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: Callable[[float], None]
) -> None:
    monkeypatch.delenv("REPLICATE_API_TOKEN", raising=False)
    free(20 * GB)
    notes = " ".join(plan_report.of_project(settings(), tmp_path, LLAMA3).notes)
    assert "A training on this machine takes 21." in notes
    assert "GB with --tar; 20.0 GB are free. That is too little: scripts/train would not begin." in notes
    free(100 * GB)
    assert "too little" not in " ".join(plan_report.of_project(settings(), tmp_path, LLAMA3).notes)


def test_words_for_bytes() -> None:
    assert [memory.gigabytes(number) for number in (1.5e9, 25e9, -3e9)] == ["1.50 GB", "25.0 GB", "-3.00 GB"]


@pytest.mark.slow
def test_what_a_gpu_has_free_decides_whether_activations_are_computed_again(tiny_base: Path) -> None:
    rows = [Row([1] * 200, [1] * 200)]
    assert not room.recomputes(settings(), tiny_base, rows, 80 * GB)
    assert room.recomputes(settings(), tiny_base, rows, 0.6 * GB)
