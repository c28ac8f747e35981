"""`model.yaml`: every option has bounds, a misspelt one is an error, and an error names option, place and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from cogpress import config, manual
from cogpress.engines.base import names
from cogpress.errors import CogpressError


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str | bytes], config.Config]:
    def of(text: str | bytes) -> config.Config:
        path = tmp_path / "model.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return config.load(path)

    return of


def parse(data: Any) -> config.Config:
    return config.parse(data, "model.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "train: {}\n"])
def test_everything_has_a_default(load: Callable[[str], config.Config], text: str) -> None:
    assert load(text) == config.Config()


def test_what_is_given_is_read(load: Callable[[str], config.Config]) -> None:
    read = load(
        """
        name: tea-1.0
        base: {source: hf://org/name@main, quantization: int8}
        prompt: {system: Be brief., template: "About {topic} in {style}"}
        data: {train: data/train.jsonl, validation_share: 0, task: reversed}
        train: {max_steps: 10, learning_rate: 1e-4, alpha: 8, optimizer: paged_adamw_8bit}
        merge: original
        serve: {cpu_threads: 2, max_context: 2048, dtype: float32}
        """
    )
    assert read.name == "tea-1.0"
    assert (read.base.source, read.base.quantization) == ("hf://org/name@main", "int8")
    assert read.prompt == config.Prompt(system="Be brief.", template="About {topic} in {style}")
    assert (read.data.validation_share, read.data.task) == (0, "reversed")
    assert read.train.learning_rate == pytest.approx(1e-4), "YAML 1.1 reads 1e-4 as text"
    assert (read.train.max_steps, read.train.lora_alpha, read.merge) == (10, 8, "original")
    assert (read.serve.cpu_threads, read.serve.max_context) == (2, 2048)
    assert config.parse(read.model_dump(mode="json"), "again") == read


def test_alpha_follows_the_rank() -> None:
    assert config.Train(rank=8).lora_alpha == 16
    assert config.Train(rank=8, alpha=3).lora_alpha == 3


def test_nothing_can_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.Config().train.rank = 3


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"trian": {}}, "trian is not an option"),
        ({"train": {"lr": 1}}, "train.lr is not an option"),
        ({"train": {"rank": 0}}, "train.rank: Input should be greater than or equal to 1 (got 0)"),
        ({"train": {"rank": "many"}}, "train.rank: Input should be a valid integer"),
        ({"train": {"rank": 1.5}}, "train.rank: Input should be a valid integer"),
        ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: Input should be"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate"),
        ({"train": {"epochs": 101}}, "train.epochs"),
        ({"train": {"max_length": 7}}, "train.max_length"),
        ({"train": {"dropout": 1}}, "train.dropout"),
        ({"train": {"seed": -1}}, "train.seed"),
        ({"serve": {"engine": "tgi"}}, "serve.engine: Input should be 'transformers' or 'vllm' (got 'tgi')"),
        ({"serve": {"speculative": {}}}, "serve.speculative: needs a method"),
        ({"serve": {"speculative": "fast"}}, "serve.speculative: is auto, none, or a mapping"),
        ({"serve": {"speculative": 3}}, "serve.speculative: is auto, none, or a mapping"),
        (
            {"serve": {"speculative": {"method": "ngram", "num_speculative_tokens": 0}}},
            "num_speculative_tokens must be",
        ),
        ({"serve": {"metrics_port": 0}}, "serve.metrics_port"),
        ({"adapters": {"a b": "x"}}, "adapters.a b"),
        ({"adapters": {"a": "http://example.com/x.tar"}}, "adapters.a"),
        ({"train": {"schedule": "exponential"}}, "'cosine', 'linear' or 'constant' (got 'exponential')"),
        ({"train": [1]}, "train: "),
        ({"data": {"validation_share": 0.6}}, "data.validation_share: Input should be less than or equal to 0.5"),
        ({"data": {"task": "backwards"}}, "data.task"),
        ({"base": {"quantization": "int4"}}, "base.quantization"),
        ({"base": {"source": 3}}, "base.source: Input should be a valid string (got 3)"),
        ({"merge": "none"}, "merge: "),
        ({"serve": {"engine": "tgi"}}, "serve.engine"),
        ({"serve": {"gpu_memory_share": 1.1}}, "serve.gpu_memory_share"),
        ({"serve": {"cpu_threads": 0}}, "serve.cpu_threads"),
        ({"name": "My model"}, "name: "),
        ({"name": "-a"}, "name: "),
        ({"name": ""}, "name: "),
        ({"prompt": {"template": "no field"}}, "prompt.template: needs at least one {field}"),
        ({"prompt": {"template": "{}"}}, "prompt.template: needs at least one {field}"),
        ({"prompt": {"template": "{0}"}}, "prompt.template: needs at least one {field}"),
        ({"prompt": {"template": "{a.b}"}}, "prompt.template: needs at least one {field}"),
        ({"prompt": {"template": "{a[0]}"}}, "prompt.template: needs at least one {field}"),
        ({"prompt": {"template": "a { brace"}}, "prompt.template: "),
        ([1, 2], "the file: "),
        ("text", "the file: "),
    ],
)
def test_what_is_wrong_is_named(data: Any, said: str) -> None:
    with pytest.raises(CogpressError) as raised:
        parse(data)
    text = str(raised.value)
    assert said in text
    assert text.startswith("model.yaml is not valid: ")
    assert text.endswith("docs/configuration.md lists every option.")


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(CogpressError, match=r"train.rank.*; serve.engine"):
        parse({"train": {"rank": 0}, "serve": {"engine": "tgi"}})


@pytest.mark.parametrize(
    "text", ["train: {", "a: b: c", "\ttrain: 1", "!!python/object/apply:os.getcwd []", b"name: \xff", "a: &a [*b]"]
)
def test_what_is_not_yaml(load: Callable[[str | bytes], config.Config], text: str | bytes) -> None:
    with pytest.raises(CogpressError, match=r"model\.yaml is not YAML: ") as raised:
        load(text)
    assert "\n" not in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CogpressError, match=r"nothing\.yaml does not exist"):
        config.load(tmp_path / "nothing.yaml")


def test_the_inputs_of_a_training_take_their_places() -> None:
    given = config.Config().override(
        {
            "base_model": "hf://org/name",
            "quantization": "none",
            "train_data": "a.jsonl",
            "validation_share": 0.1,
            "rank": 4,
            "epochs": None,
            "seed": 0,
        }
    )
    assert given.base == config.Base(source="hf://org/name", quantization="none")
    assert given.data == config.Data(train="a.jsonl", validation_share=0.1)
    assert given.train == config.Train(rank=4)


def test_no_inputs_change_nothing() -> None:
    changed = parse({"train": {"rank": 4}, "base": {"source": "elsewhere"}})
    assert changed.override({}) == changed.override({"rank": None, "base_model": None}) == changed


@pytest.mark.parametrize("inputs", [{"rank": 0}, {"unheard_of": 1}, {"validation_share": 2}])
def test_inputs_are_checked(inputs: dict[str, Any]) -> None:
    with pytest.raises(CogpressError, match="is not valid"):
        config.Config().override(inputs)


@pytest.mark.parametrize("template", ["{a:{b}}", "{a:d}", "{a!x}", "{0}", "{a.b}", "no field"])
def test_a_template_of_more_than_plain_fields_is_refused(template: str) -> None:
    with pytest.raises(CogpressError, match=r"prompt\.template"):
        config.parse({"prompt": {"template": template}}, "model.yaml")


def test_a_section_without_options_has_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("name: a\ntrain:\n  # rank: 8\n")
    assert config.load(tmp_path / "model.yaml").train == config.Train()
    with pytest.raises(CogpressError, match="cannot be read"):
        config.load(tmp_path)


def test_sources_are_checked_when_they_are_read_and_no_signature_is_shown() -> None:
    for given in ({"base": {"source": "http://host/a.tar?secret"}}, {"serve": {"weights": "ftp://u:secret@host/a"}}):
        with pytest.raises(CogpressError, match="must be https") as error:
            parse(given)
        assert "secret" not in str(error.value)
    signed = parse({"base": {"source": "https://host/a.tar?secret"}, "serve": {"weights": "https://u:secret@h/b.tar"}})
    assert signed.base.source == "https://host/a.tar?secret"
    public = signed.public()
    assert "secret" not in str(public)
    assert (public["base"]["source"], public["serve"]["weights"]) == ("https://host/a.tar", "https://h/b.tar")
    assert parse(config.Config().public()) == config.Config()


def test_the_engines_are_the_files_in_engines() -> None:
    assert list(get_args(config.EngineName)) == names()


def test_every_option_is_described_and_the_page_is_current() -> None:
    schema = config.Config.model_json_schema()
    undescribed = [
        f"{section}.{name}"
        for section, content in {**schema["$defs"], "Config": schema}.items()
        for name, option in content["properties"].items()
        if not option.get("description") and not (section == "Config" and "$ref" in option)  # a section tells its own
    ]
    assert undescribed == []
    path = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
    again = "run: .venv/bin/python -m cogpress.manual > docs/configuration.md"
    assert path.read_text(encoding="utf-8") == manual.page(), again


def test_the_page_has_every_option_with_its_bounds_and_default() -> None:
    page = manual.page()
    named = re.findall(r"^\| `([\w.]+)` ", page, re.MULTILINE)
    for name, field in config.Config.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        assert {f"{name}.{option}" for option in inner or ()} | ({name} if inner is None else set()) <= {*named}, name
    assert "push.deployment.max_instances" in named
    assert "push.training.tests.name" not in named, "the tests of a training are described once, with push.tests"
    assert "| `train.rank` | integer ≥ 1, ≤ 512 | `16` | LoRA rank" in page
    assert "| `serve.tensor_parallel` | `auto` or integer ≥ 1 | `auto` |" in page
    assert "| `push.training.data` | text | required |" in page
