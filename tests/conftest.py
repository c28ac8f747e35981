"""Fixtures that are expensive, made once a run; every folder is the tests' own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.standins.chatexamples import Write, with_templates
from tests.standins.fileserver import FileServer, serve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cogpress.data.prepare import Prepared
    from cogpress.verify.report import Verdict
    from tests.standins.pushreplicate import PushReplicate

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def cache() -> Path:
    """Where models and trained weights are kept between runs, each under a key of all that made it."""
    folder = ROOT / ".cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def base_folder(cache: Path) -> Path:
    """The embedded base model, converted once."""
    from cogpress.weights import fetch

    return fetch.base("embedded", cache)


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> PreTrainedTokenizerBase:
    from cogpress.weights import base

    return base.tokenizer(base_folder)


@pytest.fixture(scope="session")
def templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizer with chat templates of several kinds."""
    return with_templates(tokenizer)


@pytest.fixture(scope="session")
def tiny_base(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 7 M parameters with the embedded model's tokenizer: real code paths in milliseconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cogpress.weights import base, manifest

    folder = tmp_path_factory.mktemp("tiny-base")
    config = AutoConfig.from_pretrained(base_folder)
    config.update(
        {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 64,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    base.tokenizer(base_folder).save_pretrained(folder)
    manifest.write(folder, "base", {"source": {"package": "test"}})
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Iterator[FileServer]:
    """A web server on the folder `served`."""
    (tmp_path / "served").mkdir()
    with serve(tmp_path / "served") as server:
        yield server


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write rows (objects, or lines as they are) as JSONL and name the file."""

    def rows(*lines: Any, name: str = "examples.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return path

    return rows


@pytest.fixture
def prepare(tokenizer: PreTrainedTokenizerBase) -> Callable[..., Prepared]:
    """`data.prepare` with every option given, the tokenizer among them."""
    from cogpress import config
    from cogpress.data import prepare as data

    def run(path: Path, **options: Any) -> Prepared:
        given: dict[str, Any] = {
            "tokenizer": tokenizer,
            "prompt": config.Prompt(),
            "data": config.Data(validation_share=0.0),
            "max_length": 256,
            "seed": 0,
        }
        return data.prepare(path, **(given | options))

    return run


@pytest.fixture
def examples_file(tmp_path: Path) -> Path:
    """Forty short examples, as a user would bring them."""
    path = tmp_path / "examples.jsonl"
    with path.open("w") as file:
        for number in range(40):
            row = {"prompt": f"Say the number after {number}.", "completion": f"It is {number + 1}, of course."}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def demo_report() -> dict[str, Any]:
    """The demonstration, run as a user runs it; finished steps of an earlier run are reused, as a user's would be."""
    subprocess.run([sys.executable, ROOT / "scripts" / "demo"], cwd=ROOT, check=True)
    return dict(json.loads((ROOT / "runs" / "demo" / "report.json").read_text()))


@pytest.fixture(scope="session")
def operations_adapter(base_folder: Path, cache: Path) -> Path:
    """An adapter of another task on the same base, trained once: which operation a question asks for."""
    from rich.console import Console

    from cogpress import config, pipeline
    from cogpress.train import run as training
    from examples import questions

    run = cache / "tests" / "operations"
    run.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(operations_row(row)) for row in questions.generate(320, "train", seed=3)]
    (run / "examples.jsonl").write_text("\n".join(rows))
    settings = config.parse(
        {
            "prompt": {"system": "Name the operation.", "template": "{question}"},
            "data": {"validation_share": 0},
            "train": {"batch_size": 8, "learning_rate": 0.002, "rank": 8, "evaluations": 0},
        },
        "the test",
    )
    prepared = pipeline.prepare(settings, run / "examples.jsonl", base_folder, run, Console(quiet=True), skip_bad=False)
    return training.train(settings, prepared, base_folder, run, console=Console(quiet=True)).adapter


def operations_row(row: Any) -> dict[str, str]:
    """A row of the worked example as one of the other task."""
    [calculation] = json.loads(row["answer"])["calculations"]
    return {"prompt": row["question"], "completion": calculation["op"]}


@pytest.fixture(scope="session")
def trained_weights(demo_report: dict[str, Any]) -> Path:
    """The demonstration's weights: a model that has really learnt the worked example."""
    return ROOT / "runs" / "demo" / "weights"


@pytest.fixture(scope="session")
def verified(trained_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Verdict]:
    """A copy of the demonstration's weights, verified with the configured engine, and the verdict."""
    from rich.console import Console

    from cogpress import config
    from cogpress.verify import run as verify

    folder = tmp_path_factory.mktemp("verified") / "weights"
    shutil.copytree(trained_weights, folder, ignore=shutil.ignore_patterns("verification.*"))
    return folder, verify.verify(config.load(ROOT / "model.yaml"), ROOT, folder, Console())


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PushReplicate]:
    """A Replicate that can be pushed to, for a file's tests."""
    from tests.standins.pushreplicate import PushReplicate

    with PushReplicate(tmp_path_factory.mktemp("replicate")) as made:
        yield made
