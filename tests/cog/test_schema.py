"""The OpenAPI document: what `cog build` would write, and what the real runtime does with it. No model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cogpress.cog import client, schema
from cogpress.cog.process import Server
from cogpress.errors import CogpressError
from tests import wait_until

ROOT = Path(__file__).resolve().parents[2]

RUNNER = """
from typing import Optional

import cog
from cog import BaseRunner, ConcatenateIterator, Input, Secret



class Runner(BaseRunner):
    @cog.streaming
    def run(
        self,
        prompt: str = Input(description="What to say."),
        max_tokens: int = Input(default=5, ge=1, le=9),
        top_p: float = Input(default=0.9, ge=0.01, le=1),
        loud: bool = Input(default=False),
        seed: Optional[int] = Input(default=None, ge=0, le=9223372036854775807),
        style: str = Input(default="plain", choices=["plain", "bold"], description="How."),
        size: int = Input(default=2, choices=[1, 2, 4]),
        word: str = Input(default="abc", min_length=2, max_length=4, regex="^[a-z]+$", deprecated=True),
        image: Optional[cog.Path] = Input(default=None, accept="image/*"),
        token: Optional[Secret] = Input(default=None),
        stop: list[str] = Input(default=["END"]),
        bare: int = 3,
    ) -> ConcatenateIterator[str]:
        for word in prompt.split()[:max_tokens]:
            yield f"{word} "
"""

TRAINING = """
import cog
from cog import BaseModel, Input


class TrainingOutput(BaseModel):
    weights: cog.Path


def train(
    train_data: cog.Path = Input(description="Examples."), rank: int = Input(default=4, ge=1, le=8)
) -> TrainingOutput:
    return TrainingOutput(weights=train_data)
"""


def project(folder: Path, runner: str = RUNNER, training: str | None = TRAINING) -> Path:
    (folder / "predict.py").write_text(runner)
    settings = 'run: "predict.py:Runner"\n'
    if training is not None:
        (folder / "train.py").write_text(training)
        settings += 'train: "train.py:train"\n'
    (folder / "cog.yaml").write_text(settings)
    return folder


def document(root: Path) -> dict[str, Any]:
    return schema.openapi(root, "predict.py:Runner", "train.py:train")


def runner_with(decorators: str = "", inputs: str = "text: str", body: str = "return text", kind: str = "def") -> str:
    return (
        "import cog\nfrom cog import BaseRunner, Input, concurrent, streaming\n"
        f"class Runner(BaseRunner):\n    {decorators}\n    {kind} run(self, {inputs}) -> str:\n        {body}\n"
    )


def test_every_input_is_described(tmp_path: Path) -> None:
    made = document(project(tmp_path))["components"]["schemas"]
    assert made["Input"]["required"] == ["prompt"]
    properties = made["Input"]["properties"]
    assert [field["x-order"] for field in properties.values()] == list(range(12))
    for field in properties.values():
        del field["x-order"]
    text, nothing = {"type": "string"}, {"default": None, "nullable": True}
    secret = {"format": "password", "writeOnly": True, "x-cog-secret": True}
    assert properties == {
        "prompt": {"title": "Prompt", **text, "description": "What to say."},
        "max_tokens": {"title": "Max Tokens", "type": "integer", "default": 5, "minimum": 1, "maximum": 9},
        "top_p": {"title": "Top P", "type": "number", "default": 0.9, "minimum": 0.01, "maximum": 1},
        "loud": {"title": "Loud", "type": "boolean", "default": False},
        "seed": {"title": "Seed", "type": "integer", **nothing, "minimum": 0, "maximum": 9223372036854776000},
        "style": {"allOf": [{"$ref": "#/components/schemas/style"}], "default": "plain", "description": "How."},
        "size": {"allOf": [{"$ref": "#/components/schemas/size"}], "default": 2},
        "word": {
            "title": "Word",
            **text,
            "default": "abc",
            "deprecated": True,
            "minLength": 2,
            "maxLength": 4,
            "pattern": "^[a-z]+$",
        },
        "image": {"title": "Image", **text, "format": "uri", **nothing, "x-cog-accept": "image/*"},
        "token": {"title": "Token", **text, **secret, **nothing},
        "stop": {"title": "Stop", "type": "array", "items": text, "default": ["END"]},
        "bare": {"title": "Bare", "type": "integer", "default": 3},
    }
    # Comparing alone would take 1 for 1.0, which a form shows differently.
    assert isinstance(properties["max_tokens"]["minimum"], int)
    assert made["size"] == {"title": "size", "description": "An enumeration.", "enum": [1, 2, 4], "type": "integer"}


def test_outputs_and_routes(tmp_path: Path) -> None:
    made = document(project(tmp_path))
    schemas = made["components"]["schemas"]
    iterator = {"type": "array", "items": {"type": "string"}, "x-cog-array-type": "iterator"}
    assert schemas["Output"] == {"title": "Output", **iterator, "x-cog-array-display": "concatenate"}
    assert schemas["TrainingOutput"]["properties"] == {
        "weights": {"title": "Weights", "type": "string", "format": "uri"}
    }
    assert schemas["TrainingInput"]["required"] == ["train_data"]
    assert list(made["paths"]) == [
        *("/", "/health-check", "/predictions", "/predictions/{prediction_id}/cancel"),
        *("/trainings", "/trainings/{training_id}/cancel"),
    ]
    assert made["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    assert "x-cog-streaming" not in made["paths"]["/trainings"]["post"]


def test_every_reference_in_the_document_leads_somewhere(tmp_path: Path) -> None:
    made = document(project(tmp_path))

    def references(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (value for key, value in node.items() if key == "$ref")
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    names = {reference.removeprefix("#/components/schemas/") for reference in references(made)}
    assert {"Input", "TrainingOutput", "style", "ValidationError"} <= names
    assert names <= made["components"]["schemas"].keys()


def test_fields_are_in_order_with_choices_written_out(tmp_path: Path) -> None:
    root = project(tmp_path)
    fields = schema.fields(json.loads(json.dumps(document(root), sort_keys=True)))
    assert list(fields) == list(schema.inputs(root, "predict.py:Runner"))
    assert fields["style"]["enum"] == ["plain", "bold"]
    assert fields["style"]["description"] == "How."
    assert [name for name, field in fields.items() if field["required"]] == ["prompt"]
    assert schema.inputs(root, "train.py:train")["train_data"]["required"] is True


def test_every_bound_of_the_project_is_exact_in_cogs_document() -> None:
    """Cog holds bounds as float64: from 2**53 on, another number would be written than the one that was meant."""
    for reference in ("predict.py:Runner", "train.py:train"):
        for name, field in schema.inputs(ROOT, reference).items():
            assert abs(field.get("minimum", 0)) < 2**53, name
            assert abs(field.get("maximum", 0)) < 2**53, name


@pytest.mark.parametrize("decorator", ["@cog.streaming", "@streaming", "@cog.streaming()", "@streaming()"])
def test_streaming_is_found(tmp_path: Path, decorator: str) -> None:
    project(tmp_path, runner_with(decorator))
    assert schema.streams(tmp_path, "predict.py:Runner")


def test_without_decorators_nothing_streams_and_one_is_served_at_a_time(tmp_path: Path) -> None:
    project(tmp_path, runner_with())
    assert not schema.streams(tmp_path, "predict.py:Runner")
    assert schema.concurrency(tmp_path, "predict.py:Runner") == 1
    assert schema.concurrency(tmp_path, "train.py:train") == 1
    assert "x-cog-streaming" not in document(tmp_path)["paths"]["/predictions"]["post"]


@pytest.mark.parametrize("decorator", ["@cog.concurrent(max=7)", "@concurrent(max=7)"])
def test_concurrency_is_found(tmp_path: Path, decorator: str) -> None:
    project(tmp_path, runner_with(decorator, kind="async def"))
    assert schema.concurrency(tmp_path, "predict.py:Runner") == 7
    assert document(tmp_path)["paths"]["/predictions"]["post"]["summary"] == "Predict"


def test_other_choices_of_the_same_name_in_training_are_refused(tmp_path: Path) -> None:
    """Cog itself would check the training against the prediction's list."""
    inputs = 'style: str = Input(default="x", choices=["x", "{}"])'
    training = TRAINING.replace("rank: int = Input(default=4, ge=1, le=8)", inputs.format("y"))
    project(tmp_path, runner_with(inputs=inputs.format("z"), body="return style"), training)
    with pytest.raises(CogpressError, match=r"input style of train\.py:train has other choices"):
        document(tmp_path)
    project(tmp_path, runner_with(inputs=inputs.format("y"), body="return style"), training)
    assert document(tmp_path)["components"]["schemas"]["style"]["enum"] == ["x", "y"]


@pytest.mark.parametrize(
    ("reference", "source", "complaint"),
    [
        ("predict.py", RUNNER, "Write file.py:Name"),
        ("other.py:Runner", RUNNER, "other.py.* does not exist"),
        ("predict.py:Other", RUNNER, "Other"),
        ("predict.py:Runner", "import nothing_of_this_name", "nothing_of_this_name"),
        ("predict.py:Runner", "class Runner(", "Could not describe"),
        ("predict.py:Runner", "class Runner: pass", "run or predict method not found"),
        ("predict.py:Runner", runner_with(inputs="text"), "missing type annotation"),
        ("predict.py:Runner", runner_with(inputs="text: int = Input(default=9, le=8)"), "must be at maximum 8"),
        ("predict.py:Runner", runner_with("@cog.concurrent(max=2)"), "requires an async function"),
    ],
)
def test_what_cannot_be_described_is_named(tmp_path: Path, reference: str, source: str, complaint: str) -> None:
    project(tmp_path, source)
    before = list(sys.path), set(sys.modules)
    with pytest.raises(CogpressError, match=complaint):
        schema.openapi(tmp_path, reference)
    assert sys.path == before[0]
    assert not {"predict", "other"} & (set(sys.modules) - before[1])


def test_projects_with_modules_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        project(tmp_path / name, runner_with(inputs=f"{name}: str", body=f"return {name}"))
    for name in ("one", "two", "one"):
        assert list(schema.inputs(tmp_path / name, "predict.py:Runner")) == [name]


def test_a_document_is_written_whole_and_only_where_it_changed(tmp_path: Path) -> None:
    root = project(tmp_path)
    path = schema.write(root, "predict.py:Runner", "train.py:train")
    assert path == root / ".cog" / "openapi_schema.json"
    assert json.loads(path.read_text()) == document(root)
    first = path.stat().st_ino
    assert schema.write(root, "predict.py:Runner", "train.py:train").stat().st_ino == first
    project(tmp_path, runner_with())
    assert schema.write(root, "predict.py:Runner", "train.py:train").stat().st_ino != first
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    path.write_text("{ broken")
    schema.write(root, "predict.py:Runner")
    assert "TrainingInput" not in json.loads(path.read_text())["components"]["schemas"]


@pytest.mark.slow
def test_this_projects_own_inputs_are_all_explained_and_light_to_read() -> None:
    """`predict.py` and `train.py` are imported to be described, so they may import nothing heavy."""
    program = (
        "import json, sys; from pathlib import Path; from cogpress.cog import schema; "
        f"made = schema.openapi(Path({str(ROOT)!r}), 'predict.py:Runner', 'train.py:train'); "
        "print(json.dumps([made, [name for name in ('torch', 'vllm', 'transformers') if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    made, heavy = json.loads(done.stdout)
    assert heavy == []
    assert made["paths"]["/predictions"]["post"]["x-cog-streaming"] is True
    for name in ("Input", "TrainingInput"):
        properties = made["components"]["schemas"][name]["properties"]
        assert [field for field in properties if len(properties[field].get("description", "")) < 10] == []


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    root = project(tmp_path_factory.mktemp("served"))
    with Server(root, log=root / "server.log") as server:
        server.wait_ready(120)
        yield root, server.url


@pytest.fixture
def served(started: tuple[Path, str]) -> tuple[Path, str]:
    """The server, once its only slot is free again."""
    assert wait_until(lambda: (client.health(started[1]) or {}).get("status") == "READY")
    return started


@pytest.mark.slow
def test_the_runtime_serves_the_document(served: tuple[Path, str]) -> None:
    root, url = served
    assert client.openapi(url) == document(root)


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "a", "top_p": 1.01}, "top_p"),
        ({"prompt": "a", "style": "thin"}, "style"),
        ({"prompt": "a", "size": 3}, "size"),
        ({"prompt": "a", "word": "A1"}, "word"),
        ({"prompt": "a", "word": "abcde"}, "word"),
        ({"prompt": "a", "stop": "END"}, "stop"),
    ],
)
def test_the_runtime_refuses_what_is_out_of_bounds(served: tuple[Path, str], given: dict[str, Any], wrong: str) -> None:
    answer = httpx.post(f"{served[1]}/predictions", json={"input": given})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "input", wrong]


def test_the_runtime_takes_what_is_within_bounds(served: tuple[Path, str]) -> None:
    given = {"prompt": "a b c", "max_tokens": 2, "seed": 2**63 - 1, "size": 4, "style": "bold", "stop": ["x", "y"]}
    answer = httpx.post(f"{served[1]}/predictions", json={"input": given}).json()
    assert (answer["status"], answer["output"]) == ("succeeded", ["a ", "b "])


def test_the_runtime_streams(served: tuple[Path, str]) -> None:
    headers = {"Accept": "text/event-stream"}
    answer = httpx.post(f"{served[1]}/predictions", json={"input": {"prompt": "a b"}}, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert [line for line in answer.text.splitlines() if line.startswith("event: ")] == [
        *("event: start", "event: output", "event: output", "event: completed")
    ]


def test_facts_about_the_runtime_that_others_build_on(served: tuple[Path, str]) -> None:
    """`client` and `options` work around these: when one fails, they can be simpler."""
    nothing = httpx.post(f"{served[1]}/predictions", json={"input": {"prompt": "a", "seed": None}})
    assert nothing.status_code == 422, "null is refused for an optional input; client leaves None out"
    unknown = httpx.post(f"{served[1]}/predictions", json={"input": {"prompt": "a", "promt": "b"}})
    # Unknown inputs are dropped silently; options.parse_inputs refuses them.
    assert unknown.json()["status"] == "succeeded"
