"""Fixtures that are expensive, made once a run; every folder is the tests' own."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests import Script
from tests.fixtures import ANSWERS, OPERATIONS, QUERIES
from tests.standins.chatexamples import Write, with_templates
from tests.standins.fileserver import FileServer, serve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cogpress.cog.process import Server
    from cogpress.config import Config
    from cogpress.data.prepare import Prepared
    from cogpress.verify.report import Verdict
    from tests.standins.pushreplicate import PushReplicate

# A shell's background job ignores SIGINT, and so would every program that a test starts to end it with SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A server on a busy machine may think for longer than the five seconds that httpx waits; no test is about that.
httpx._config.DEFAULT_TIMEOUT_CONFIG.read = 60

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parents[1]


LONGEST = (
    "push/test_ship", "verify/test_run", "engines/test_engines", "playground/test_server", "quantize/test_run",
    "faults/test_faults", "test_predict", "playground/test_openai", "engines/test_speculative", "publish/test_card",
    "serve/test_adapters", "faults/test_kills", "playground/test_page", "push/test_push", "playground/test_crash",
    "setup/test_environment", "cog/test_process", "playground/test_libraries", "engines/test_schemas",
)  # fmt: skip
"""Files, the longest first: one that began last would keep one process busy while the others are done."""

TOGETHER = {"trained_server": ("test_predict", "playground/test_openai"), "verified": LONGEST[:2]}
"""Fixtures that take long, and the files that use them: one process runs these, and makes the fixture once."""


def pytest_configure() -> None:
    """Give each of several processes that share the tests its own cores: two that compute on the same ones wait."""
    worker, count = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    cores = sorted(os.sched_getaffinity(0))
    if worker and 1 < count <= len(cores):
        os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) :: count])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests without a marker for long ones as `unit`, and put the longest files first."""
    order = {name: number for number, name in enumerate(LONGEST)}
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("slow", "server", "train")):
            item.add_marker("unit")
    items.sort(key=lambda item: order.get(_file(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """One process runs a file, and the files that share a fixture.

    xdist's own groups, `--dist loadgroup`, are without effect in pytest 9.2 (xdist 3.8.0).
    """
    from xdist.scheduler import LoadScopeScheduling

    groups = {file: fixture for fixture, files in TOGETHER.items() for file in files}

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return groups.get(_file(nodeid), _file(nodeid))

    return Scheduler(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")


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
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Script:
    """Run a script in this process, with the environment that it would enter; returns status, output and errors."""
    from cogpress.setup import environment

    monkeypatch.setattr(environment, "enter", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(name: str, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"scripts/{name}", *map(str, arguments)])
        status = 0
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        return status, *capsys.readouterr()

    return run


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
def operations_adapter() -> Path:
    """An adapter of another task on the same base: which operation a question asks for."""
    return OPERATIONS


@pytest.fixture(scope="session")
def trained_run(base_folder: Path, cache: Path) -> Path:
    """A run of the worked example as scripts/train leaves it, with the committed adapter merged instead of trained."""
    from rich.console import Console

    from cogpress import config, demo, pipeline
    from cogpress.files import new_folder, write_json
    from cogpress.merge import merge
    from cogpress.train import run as training
    from cogpress.weights import manifest
    from examples import questions

    adapter, base = manifest.fingerprint(QUERIES), manifest.fingerprint(base_folder)
    # One for each process that shares the tests: verifications write into it.
    name = "-".join(["queries", adapter[:8], base[:8], *filter(None, [os.environ.get("PYTEST_XDIST_WORKER")])])
    run = cache / "tests" / name
    if run.is_dir():
        return run
    with new_folder(run) as part:
        settings = config.load(ROOT / "model.yaml")
        examples, _ = questions.write(part / "data", demo.TRAIN_ROWS, demo.QUESTIONS, settings.train.seed)
        settings = settings.override({"train_data": str(run / "data" / examples.name)})
        quiet = Console(quiet=True)
        prepared = pipeline.prepare(settings, examples, base_folder, part, quiet, skip_bad=False)
        write_json(part / "key.json", training.run_key(settings, prepared, base))
        write_json(part / "config.json", settings.public())
        shutil.copytree(QUERIES, part / "adapter")
        merge.merge(base_folder, part / "adapter", part / "weights")
    return run


@pytest.fixture(scope="session")
def trained_weights(trained_run: Path) -> Path:
    """Weights of a model that has really learnt the worked example."""
    return trained_run / "weights"


@pytest.fixture(scope="session")
def trained_server(trained_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The project's own server with vLLM on `trained_weights`, for all tests that only ask. None of them may end it."""
    from cogpress.cog import client
    from cogpress.cog.process import Server

    with Server(ROOT, weights=str(trained_weights), log=tmp_path_factory.mktemp("trained") / "server.log") as server:
        server.wait_ready(300)
        client.predict(server.url, {"prompt": "warm up", "max_tokens": 2})
        yield server


@pytest.fixture(scope="session")
def answered() -> list[dict[str, Any]]:
    """What `trained_weights` answer, by transformers: fields (`prompt`), `expected` and `answer` of test questions."""
    return list(json.loads(ANSWERS.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def settings_verified(trained_run: Path) -> Config:
    """The project's configuration, verified with some of the test questions of `trained_run`."""
    from cogpress import config

    settings = config.load(ROOT / "model.yaml")
    # One answer more or less right, where two tokens are as likely, is not what the tests are about.
    some = {"examples": str(trained_run / "data" / "test.jsonl"), "rows": 24, "score_loss": 0.05}
    return settings.model_copy(update={"verify": settings.verify.model_copy(update=some)})


@pytest.fixture(scope="session")
def verified(
    trained_run: Path, settings_verified: Config, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Verdict]:
    """A copy of the trained weights, verified with the configured engine, and the verdict."""
    from rich.console import Console

    from cogpress.verify import run as verify

    folder = tmp_path_factory.mktemp("verified") / "weights"
    shutil.copytree(trained_run / "weights", folder)
    return folder, verify.verify(settings_verified, ROOT, folder, Console(), run=trained_run)


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PushReplicate]:
    """A Replicate that can be pushed to, for a file's tests."""
    from tests.standins.pushreplicate import PushReplicate

    with PushReplicate(tmp_path_factory.mktemp("replicate")) as made:
        yield made
