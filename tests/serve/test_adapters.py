"""Several adapters over one base in one server: each answers as training scored it."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cogpress import config, prompts
from cogpress.cog import client
from cogpress.cog.process import Server
from cogpress.errors import CogpressError
from cogpress.serve import adapters as multilora
from cogpress.train.answers import generate
from cogpress.verify import distributions
from cogpress.weights import fetch, manifest
from examples import questions
from tests.fixtures import operations_row

ROOT = Path(__file__).resolve().parents[2]
LONG = {"prompt": "Count up.", "min_tokens": 2000, "max_tokens": 2000}
"""A prediction that would run for half a minute and more."""


@pytest.fixture(scope="module")
def project(
    trained_weights: Path, operations_adapter: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A project as a user would have it, with one adapter as a folder, one as a tar and one that is not there."""
    root = tmp_path_factory.mktemp("project")
    for name in ("cog.yaml", "predict.py", "train.py"):
        shutil.copyfile(ROOT / name, root / name)
    for name in ("cogpress", "examples"):
        (root / name).symlink_to(ROOT / name)
    (root / ".cache").symlink_to(cache)
    shutil.copytree(operations_adapter, root / "operations")
    settings = yaml.safe_load((ROOT / "model.yaml").read_text())
    settings["adapters"] = {
        "queries": str(trained_weights.parent / "adapter"),
        "operations": "operations",
        "again": str(operations_adapter),
        "missing": "nowhere",
    }
    settings["serve"] |= {"adapters_at_once": 2, "adapters_kept": 2}
    (root / "model.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    return root


def made(root: Path) -> multilora.Adapters:
    settings = config.load(root / "model.yaml")
    return multilora.Adapters(settings.adapters, settings, root)


def get(adapters: multilora.Adapters, name: str) -> multilora.ReadyAdapter:
    return asyncio.run(adapters.get(name))


@pytest.mark.slow
def test_adapters_are_fetched_on_first_use(project: Path) -> None:
    adapters = made(project)
    folder = Path(adapters.weights(None))
    found = fetch.model(folder, project)
    adapters.check(found)
    assert adapters.rank == 32
    first = get(adapters, "queries")
    assert (first.adapter.number, first.adapter.rank, first.prompt.names) == (
        1,
        8,
        ["question", "columns"],
    )
    assert get(adapters, "queries") is first
    assert get(adapters, "operations").prompt.system == "Name the operation."
    with pytest.raises(CogpressError, match=r"no adapter 'sql'. The adapters are queries, operations, again, missing"):
        get(adapters, "sql")
    with pytest.raises(CogpressError, match=r"nowhere' is not a folder or tar"):
        get(adapters, "missing")


@pytest.mark.slow
def test_the_shared_base_is_the_one_that_they_were_trained_on(project: Path, base_folder: Path) -> None:
    """Quantized and dequantized again, tensor by tensor, and nothing added."""
    import torch

    from cogpress.merge.dequantize import as_trained
    from cogpress.weights import tensors

    folder = Path(made(project).weights(None))
    facts = manifest.read(folder) or {}
    assert facts["merge"] == {"onto": "dequantized", "layers": 0, "adapter": None}
    assert "prompt" not in facts, "each adapter has its own"
    name = "model.layers.3.mlp.down_proj.weight"
    original, shared = (tensors.load(tensors.stored(one)[name], name) for one in (base_folder, folder))
    assert not torch.equal(original, shared)
    assert torch.equal(as_trained(original, "nf4", torch.bfloat16), shared)


@pytest.mark.slow
def test_other_weights_are_refused(project: Path, trained_weights: Path) -> None:
    adapters = made(project)
    assert adapters.weights(trained_weights) == str(trained_weights)
    with pytest.raises(CogpressError, match=r"not the base that the adapters were trained on.*scripts/merge"):
        adapters.check(fetch.model(trained_weights, project))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": {"source": "embedded", "fingerprint": "0" * 64}}, "trained on another base than the others"),
        ({"quantization": "none"}, "trained on another base than the others, or with another quantization"),
    ],
)
def test_an_adapter_of_another_base_is_refused(project: Path, tmp_path: Path, change: Any, said: str) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(project / "operations", folder)
    facts = manifest.read(folder) or {}
    manifest.write(folder, "adapter", {**{k: v for k, v in facts.items() if k != "files"}, **change})
    settings = config.load(project / "model.yaml")
    sources = {**settings.adapters, "other": str(folder)}
    adapters = multilora.Adapters(sources, settings, project)
    adapters.weights(None)
    with pytest.raises(CogpressError, match=said):
        get(adapters, "other")


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[Server]:
    with Server(project, log=project / "server.log") as server:
        server.wait_ready(300)
        yield server


def ask(server: Server, **inputs: Any) -> str:
    return "".join(client.predict(server.url, {"max_tokens": 160, **inputs})["output"])


@pytest.mark.slow
@pytest.mark.server
def test_mixed_traffic_is_answered_as_training_scored_it(
    server: Server,
    base_folder: Path,
    operations_adapter: Path,
    answered: list[dict[str, Any]],
    tokenizer: Any,
) -> None:
    rows = questions.generate(8, "test", seed=0)
    work = [
        ("queries", {"fields": json.dumps({"question": row["question"], "columns": row["columns"]})}) for row in rows
    ]
    work += [("operations", {"prompt": row["question"]}) for row in rows]
    order = sorted(range(16), key=lambda at: at % 8)  # in turn, so that every batch holds both
    with ThreadPoolExecutor(16) as pool:
        running = {at: pool.submit(ask, server, adapter=work[at][0], **work[at][1]) for at in order}
        texts = [running[at].result() for at in range(16)]
    # What training scored: the adapters on the quantized base, by transformers.
    assert sum(one["answer"] == text for one, text in zip(answered, texts[:8], strict=False)) >= 7
    reference = distributions.reference_model(base_folder, operations_adapter)
    form = config.Prompt(system="Name the operation.")
    asked = [prompts.encode(tokenizer, prompts.Question(row["question"]), form) for row in rows]
    expected = generate(reference, tokenizer, asked, 8)
    wanted = [operations_row(row)["completion"] for row in rows]
    trained = sum(one == want for one, want in zip(expected, wanted, strict=True))
    served = sum(one == want for one, want in zip(texts[8:], wanted, strict=True))
    assert trained >= 6
    assert served >= trained - 1
    assert sum(one == other for one, other in zip(texts[8:], expected, strict=True)) >= 7


@pytest.mark.slow
@pytest.mark.server
def test_more_adapters_than_fit_take_turns(server: Server) -> None:
    question = questions.generate(1, "test", seed=11)[0]["question"]
    first = ask(server, adapter="operations", prompt=question)
    for name in ("queries", "again", "operations", "again"):
        fields = json.dumps({"question": question, "columns": ["a.b"]})
        text = ask(server, adapter=name, **({"fields": fields} if name == "queries" else {"prompt": question}))
        assert (text == first) == (name != "queries")


@pytest.mark.slow
@pytest.mark.server
def test_an_unavailable_adapter_fails_alone(server: Server) -> None:
    with pytest.raises(CogpressError, match="no adapter 'sql'"):
        ask(server, adapter="sql", prompt="x")
    with pytest.raises(CogpressError, match="is not a folder or tar"):
        ask(server, adapter="missing", prompt="x")
    assert "Paris" in ask(server, prompt="What is the capital of France?", system_prompt="")
    assert client.health(server.url)["status"] == "READY"  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.server
def test_a_dead_engine_is_reported_at_once(server: Server) -> None:
    """Last, because it ends the server of this file."""
    assert server._process is not None
    running = client.stream(server.url, LONG)
    assert next(event for event in running if event.kind == "output")
    for process in psutil.Process(server._process.pid).children(recursive=True):
        if "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline()):
            process.kill()
    with pytest.raises(CogpressError, match="engine has stopped"):
        list(running)
    with pytest.raises(CogpressError, match="engine has stopped"):
        client.predict(server.url, {"prompt": "hello"})
    assert (client.health(server.url) or {})["status"] != "READY"
