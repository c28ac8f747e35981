"""Batch inference: each line once, in order, and resumed after any interruption."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from cogpress import config
from cogpress.cog import schema
from cogpress.engines.base import DEAD
from cogpress.errors import CogpressError
from cogpress.files import read_json
from cogpress.serve import batch
from cogpress.weights import archive, manifest
from tests.standins.fileserver import FileServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fields() -> dict[str, dict[str, Any]]:
    return schema.inputs(ROOT, "predict.py:Runner")


class Cut(BaseException):
    """The end of a run that nobody expected, as by a signal."""


class Model:
    """Answers a prompt with itself; later ones first. Ends after so many, as a cut would."""

    def __init__(self, most: int = 10**9, error: BaseException | None = None) -> None:
        self.asked: list[Mapping[str, Any]] = []
        self.running = self.at_once = 0
        self.most, self.error = most, error

    async def answer(
        self, given: Mapping[str, Any], record: Callable[[str, Any], None], *, stream: bool = True
    ) -> AsyncIterator[str]:
        assert not stream
        if given.get("prompt") == "":
            raise CogpressError("There is nothing to answer.")

        async def chunks() -> AsyncIterator[str]:
            self.running += 1
            self.at_once = max(self.at_once, self.running)
            await asyncio.sleep(0.02 / (len(self.asked) + 1))
            self.running -= 1
            if len(self.asked) >= self.most:
                raise self.error or Cut
            self.asked.append(given)
            record("output_token_count", 2)
            yield "answer to "
            yield str(given.get("prompt", given.get("fields")))

        return chunks()


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def go(tmp_path: Path, fields: dict[str, dict[str, Any]]) -> Callable[..., batch.Totals]:
    def run(model: Model, **more: Any) -> batch.Totals:
        options: dict[str, Any] = {"concurrency": 4, "made_by": {"weights": "w"}, **more}
        return batch.run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", lambda: model, fields, **options)

    return run


def test_results_are_in_order_and_the_engine_is_kept_full(tmp_path: Path, go: Callable[..., batch.Totals]) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": f"p{n}", "id": n} for n in range(20)])
    model, seen = Model(), []
    totals = go(model, progress=lambda *now: seen.append(now))
    assert model.at_once == 6
    found = results(tmp_path / "out.jsonl")
    assert [row["line"] for row in found] == list(range(1, 21))
    assert [(row["id"], row["output"]) for row in found] == [(n, f"answer to p{n}") for n in range(20)]
    assert (totals.lines, totals.reused, totals.failed, totals.tokens) == (20, 0, 0, 40)
    assert seen[0] == (0, 0, 0)
    assert seen[-1] == (20, 0, 40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_errors_are_told_line_by_line(tmp_path: Path, go: Callable[..., batch.Totals]) -> None:
    write(
        tmp_path / "in.jsonl",
        [
            {"prompt": "good"},
            "",
            "{",
            "[1]",
            {"prompt": ""},
            {"prompt": "x", "temperatur": 1},
            {"prompt": "x", "temperature": 9},
            {"prompt": "x", "temperature": "hot"},
            {"prompt": "x", "max_tokens": True, "custom_id": "mine"},
            {"prompt": {"question": "q"}, "completion": "c"},
            '{"prompt": "x", "prompt": "y"}',
            '{"prompt": "x", "temperature": NaN}',
        ],
    )
    totals = go(Model())
    found = results(tmp_path / "out.jsonl")
    assert [row["line"] for row in found] == [1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "blank lines are none"
    said = [row.get("error", "") for row in found]
    assert said[0] == said[8] == ""
    assert said[1].startswith("The line is not JSON: Expecting")
    assert said[2].startswith("The line must be a JSON object")
    assert said[3] == "There is nothing to answer."
    assert said[4].startswith("There is no input 'temperatur'. The inputs are question,")
    assert said[5] == "temperature is 9; it must be from 0.0 to 5.0."
    assert said[6] == "temperature must be of type number, not a string."
    assert said[7] == "max_tokens must be of type integer, not a boolean."
    assert found[7]["custom_id"] == "mine"
    assert found[8]["output"] == 'answer to {"question": "q"}'
    assert found[8]["completion"] == "c"
    assert "the key 'prompt' stands twice" in said[9]
    assert "NaN is not allowed in JSON" in said[10]
    assert totals.failed == 9


def test_one_line_cannot_end_the_run(tmp_path: Path, go: Callable[..., batch.Totals]) -> None:
    half = r'{"id": "i\ud83d", "prompt": "p\ud83d", "max_tokens": 8.0, "seed": 1.0}'
    write(tmp_path / "in.jsonl", [half, {"prompt": "fails"}, {"prompt": "x", "max_tokens": 8.5}, {"prompt": "last"}])

    class Failing(Model):
        async def answer(
            self, given: Mapping[str, Any], record: Callable[[str, Any], None], *, stream: bool = True
        ) -> AsyncIterator[str]:
            if given["prompt"] == "fails":
                raise TypeError("unexpected")
            return await super().answer(given, record, stream=stream)

    assert go(Failing()).failed == 2
    found = results(tmp_path / "out.jsonl")
    assert (found[0]["id"], found[0]["output"]) == ("i\ufffd", "answer to p\ufffd")
    assert found[1]["error"] == "The model failed at this line unexpectedly. The log has the cause."
    assert found[2]["error"] == "max_tokens must be of type integer, not 8.5."
    assert found[3]["output"] == "answer to last"


def test_a_cut_run_goes_on_without_redoing_or_losing_a_line(tmp_path: Path, go: Callable[..., batch.Totals]) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": f"p{n}"} for n in range(20)])
    with pytest.raises(Cut):
        go(Model(7))
    assert not (tmp_path / "out.jsonl").exists()
    journal = tmp_path / "out.jsonl.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-9])  # as of a machine that stopped while it wrote
    second = Model()
    totals = go(second)
    assert totals.reused == 6
    assert len(second.asked) == 14
    assert [row["output"] for row in results(tmp_path / "out.jsonl")] == [f"answer to p{n}" for n in range(20)]
    assert not journal.exists()


@pytest.mark.parametrize("change", ["input", "weights", "fresh"])
def test_a_journal_of_something_else_is_not_gone_on_with(
    tmp_path: Path, go: Callable[..., batch.Totals], change: str
) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": f"p{n}"} for n in range(6)])
    with pytest.raises(Cut):
        go(Model(3))
    if change == "input":
        write(tmp_path / "in.jsonl", [{"prompt": f"q{n}"} for n in range(6)])
    more = {"weights": {"made_by": {"weights": "v"}}, "fresh": {"fresh": True}}.get(change, {})
    assert go(Model(), **more).reused == 0
    assert len(results(tmp_path / "out.jsonl")) == 6


def test_a_dead_engine_ends_the_run_and_keeps_what_was_finished(
    tmp_path: Path, go: Callable[..., batch.Totals]
) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": f"p{n}"} for n in range(9)])
    with pytest.raises(CogpressError, match=r"engine stopped at line .* run the same command again"):
        go(Model(3, CogpressError(DEAD)))
    assert go(Model()).reused == 3


def test_a_finished_file_asks_no_model(tmp_path: Path, go: Callable[..., batch.Totals]) -> None:
    write(tmp_path / "in.jsonl", [])
    assert go(None).lines == 0  # type: ignore[arg-type]
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match="cannot be read"):
        batch.count(tmp_path / "none")


def test_two_runs_cannot_write_one_result(tmp_path: Path, go: Callable[..., batch.Totals]) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": "p"}])
    with batch.BatchJournal(tmp_path / "out.jsonl", "other", {}, False), pytest.raises(CogpressError, match="Another"):
        go(Model())


def test_lines_may_be_appended_or_changed_between_runs(tmp_path: Path, go: Callable[..., batch.Totals]) -> None:
    rows = [{"prompt": f"p{n}"} for n in range(6)]
    write(tmp_path / "in.jsonl", rows)
    with pytest.raises(Cut):
        go(Model(3), concurrency=1)
    write(tmp_path / "in.jsonl", [{"prompt": "new"}, *rows[1:], {"prompt": "more"}])
    assert go(Model()).reused == 2
    said = [row["output"] for row in results(tmp_path / "out.jsonl")]
    assert said == [f"answer to {name}" for name in ("new", "p1", "p2", "p3", "p4", "p5", "more")]


def test_finished_lines_count_wherever_they_stand_now(
    tmp_path: Path, go: Callable[..., batch.Totals], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": f"p{n // 2}"} for n in range(6)])
    with pytest.raises(Cut):
        go(Model(4), concurrency=1)
    write(tmp_path / "in.jsonl", [{"prompt": name} for name in ("new", "p1", "p0", "p2", "p1", "p1")])
    asked = Model()
    assert go(asked).reused == 3
    assert sorted(str(one["prompt"]) for one in asked.asked) == ["new", "p1", "p2"]
    found = [(row["line"], row["output"]) for row in results(tmp_path / "out.jsonl")]
    names = ("new", "p1", "p0", "p2", "p1", "p1")
    assert found == [(at, f"answer to {name}") for at, name in enumerate(names, 1)]
    assert "1 finished lines of the journal are not in the input any more" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.journal.old").read_text().count("answer to p0") == 2


@pytest.fixture
def served(tiny_base: Path, site: FileServer, tmp_path: Path) -> dict[str, str]:
    """The same weights from each kind of source."""
    folder = tmp_path / "served" / "model"
    shutil.copytree(tiny_base, folder)
    tar = archive.pack(folder, tmp_path / "served" / "model.tar")
    return {"folder": str(folder), "tar": str(tar), "web tar": f"{site.url}/model.tar"}


@pytest.mark.parametrize("kind", ["folder", "tar", "web tar"])
def test_the_weights_themselves_decide_whether_a_run_goes_on(tmp_path: Path, served: dict[str, str], kind: str) -> None:
    def key(**options: Any) -> str:
        settings = config.Config().model_copy(update=options)
        return batch._key(batch.made_by(served[kind], settings, tmp_path))

    before = key()
    assert key(playground=config.Playground(retention_days=3)) == before
    assert key(serve=config.Serve(log="requests", cpu_kv_cache_gb=3)) == before
    assert key(prompt=config.Prompt(system="Be short.")) != before
    assert key(serve=config.Serve(max_context=64)) != before
    folder = tmp_path / "served" / "model"
    facts = read_json(folder / manifest.NAME)
    manifest.write(folder, "base", {"source": {"package": "test"}})
    assert facts.keys() == read_json(folder / manifest.NAME).keys()
    archive.pack(folder, tmp_path / "served" / "model.tar")
    assert key() == before, "made again, and the same"
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    manifest.write(folder, "base", {"source": {"package": "test"}})
    archive.pack(folder, tmp_path / "served" / "model.tar")
    assert key() != before


def test_a_changed_adapter_begins_anew(tmp_path: Path, operations_adapter: Path) -> None:
    shutil.copytree(operations_adapter, tmp_path / "adapter")
    settings = config.Config(adapters={"one": "adapter"})

    def key() -> str:
        return batch._key(batch.made_by(None, settings, tmp_path))

    before = key()
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors = {name: value + 1 for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    (tmp_path / "adapter" / manifest.NAME).unlink(missing_ok=True)
    assert key() != before


def test_the_input_is_never_the_result(tmp_path: Path, fields: dict[str, dict[str, Any]]) -> None:
    path = write(tmp_path / "in.jsonl", [{"prompt": "p"}])
    with pytest.raises(CogpressError, match="is the input itself"):
        batch.run(path, path, Model, fields, concurrency=1, made_by={})


def test_an_old_journal_is_set_aside(
    tmp_path: Path, go: Callable[..., batch.Totals], capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": f"p{n}"} for n in range(6)])
    with pytest.raises(Cut):
        go(Model(3))
    go(Model(), made_by={"weights": "v"})
    assert "set aside as" in capsys.readouterr().err
    assert (tmp_path / "out.jsonl.journal.old").read_text().count("answer to") == 3


def test_an_engine_that_died_of_anything_leaves_lines_open(tmp_path: Path, go: Callable[..., batch.Totals]) -> None:
    write(tmp_path / "in.jsonl", [{"prompt": f"p{n}"} for n in range(9)])
    model = Model(3, RuntimeError("the device is gone"))
    model.engine = type("Engine", (), {"dead": property(lambda _: len(model.asked) >= 3)})()  # type: ignore[attr-defined]
    with pytest.raises(CogpressError, match="engine stopped at line"):
        go(model)
    assert go(Model()).reused == 3
