"""The model card: its content, its runnable programs, and text that must not break it."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cogpress import config, prompts
from cogpress.config import Prompt
from cogpress.engines import vllm
from cogpress.publish import card
from cogpress.publish.licence import Licence, Origin
from cogpress.weights import base
from tests.standins.chatexamples import variant
from tests.standins.shapes import SHAPES, tokenizer_of

ROOT = Path(__file__).resolve().parents[2]

NASTY = "`a` | **b** <script>x</script> [l](http://x) ---\n---\n# h\n```\nout\n````\n{{$1}} \\ \u2028é 'q' \"q\""


def facts(**given: Any) -> card.CardFacts:
    usual: dict[str, Any] = {
        "repo": "my-team/queries",
        "branch": "main",
        "origin": Origin("base", "org/base", Licence("apache-2.0"), ("en",)),
        "licence": Licence("apache-2.0"),
        "prompt": Prompt(system="Write the query.", template="{question}\nColumns:\n{columns}"),
        "has_chat_template": True,
        "manifest": {"quantization": "nf4", "compute_dtype": "bfloat16", "merge": {"onto": "dequantized"}},
    }
    return card.CardFacts(**{**usual, **given})


FULL: dict[str, Any] = {
    "verification": {
        "created_at": "2026-11-21T13:45:35Z",
        "checks": [{"name": "mean KL", "value": 4.6e-05, "limit": 0.01, "passed": True}],
        "metrics": {"exact_match": {"tuned": 0.984375, "questions": 64}, "scheme": "bf16", "list": [1]},
    },
    "config": config.parse({"train": {"max_steps": 230, "rank": 32, "learning_rate": 0.0012}}, "test"),
    "result": {
        "steps": 230,
        "train_loss": 0.172,
        "validation_loss": None,
        "seconds": 332.67,
        "tokens": 100018,
        "tokens_per_second": 300.6,
        "peak_memory_gb": 4.54,
    },
    "data": {
        "lines": 960,
        "train": 922,
        "validation": 30,
        "duplicates": 8,
        "tokens": 104431,
        "learnt_tokens": 42256,
        "length_p50": 107,
        "length_p95": 150,
        "length_max": 178,
        "formats": {"prompt/completion": 960},
    },
    "divergence": {
        "merged": {"mean_kl": 4.6e-05, "p99_kl": 0.0006, "top1_agreement": 1.0, "tokens": 1635},
        "naive": {"mean_kl": 0.0061, "p99_kl": 0.106, "top1_agreement": 0.9976, "tokens": 1635},
    },
    "exact_match": {"base": 0.0, "tuned": 0.984375, "questions": 64},
}


def metadata(text: str) -> dict[str, Any]:
    """The metadata as the Hub reads it, between the first two lines of dashes."""
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found
    return dict(yaml.safe_load(found[1]))


def test_a_card_holds_the_run(tmp_path: Path) -> None:
    text = card.write(facts(**FULL))
    assert metadata(text) == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["cogpress", "qlora"],
    }
    for line in (
        "| exact match, 64 held-out questions | 0.0% | 98.4% |",
        "| this model | 0.00005 | 0.00060 | 100.0% |",
        "| the usual merge, onto the original weights | 0.00610 | 0.10600 | 99.8% |",
        "| mean KL | 0.00005 | 0.01000 | yes |",
        "| exact match, tuned | 0.98438 |",
        "| scheme | bf16 |",
        "| adapter | LoRA, rank 32, alpha 64, dropout 0, on all linear layers |",
        "| steps | 230 |",
        "| time | 333 s, 301 tokens/s |",
        "| validation loss | - |",
        "| left out | 8 duplicates |",
        "| tokens of an example: median, 95th percentile, longest | 107, 150, 178 |",
    ):
        assert f"\n{line}\n" in text, line
    assert "unverified" not in text
    assert "## Examples" not in text


def test_a_card_omits_what_is_unknown() -> None:
    text = card.write(facts(origin=Origin("my base"), unverified="there is *no* report", manifest={}))
    assert "base_model" not in metadata(text)
    assert metadata(text)["tags"] == ["cogpress", "lora"]
    assert r"> **These weights are unverified: there is \*no\* report.**" in text
    assert re.findall("^## .*", text, re.M) == ["## Use", "## Licence"]


def test_another_licence_keeps_its_name_and_link() -> None:
    own = Licence("other", "Ours: v1", "https://licence.example/v1")
    text = card.write(facts(licence=own))
    assert metadata(text)["license_name"] == "Ours: v1"
    assert metadata(text)["license_link"] == "https://licence.example/v1"
    assert "These weights: [Ours: v1](<https://licence.example/v1>). The base model: apache-2.0." in text


def test_no_text_breaks_the_card() -> None:
    """Headings, tables, fences and metadata are the same for harmless and hostile text."""

    def skeleton(text: str) -> tuple[Any, list[str], list[int]]:
        fence, headings, columns = "", [], []
        for line in text.splitlines():
            opened = re.match(r"`{3,}", line)
            if opened and not fence:
                fence = opened[0]
            elif fence and line == fence:
                fence = ""
            elif not fence:
                headings += re.findall(r"^#+ .*", line)
                columns += [len(re.findall(r"(?<!\\)\|", line))] if line.startswith("|") else []
                assert "<script" not in line.replace("\\<", "")
                assert "](http://x" not in line.replace("\\]", "")
        assert not fence
        return metadata(text), headings, columns

    def with_text(text: str) -> str:
        report = {
            "created_at": text,
            "checks": [{"name": text, "value": text, "limit": None, "passed": True}],
            "metrics": {text: text},
        }
        return card.write(
            facts(
                **{
                    **FULL,
                    "verification": report,
                    "config": config.parse({"train": {"target_modules": text}}, "test"),
                    "origin": Origin(text),
                    "unverified": text,
                    "prompt": Prompt(system=text, template="{question}" + text.replace("{{$1}}", "")),
                    "answers": [{"prompt": text, "tuned": text, "expected": text, "base": text}],
                }
            )
        )

    assert skeleton(with_text(NASTY)) == skeleton(with_text("plain"))


@pytest.mark.slow
@pytest.mark.parametrize("template", ["{question}\nColumns:\n{columns}", "{prompt}", f"{{question}} {NASTY}"])
@pytest.mark.parametrize("system", ["", "Write \"the\" query.\nNow, in 'one' line."])
def test_the_transformers_program_asks_as_training_did(system: str, template: str, tiny_base: Path) -> None:
    template = template.replace("{{$1}}", "{{1}}")
    told = facts(prompt=Prompt(system=system, template=template))
    program = card.transformers_snippet(told).replace('"my-team/queries"', repr(str(tiny_base)))
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(program.replace("max_new_tokens=256", "max_new_tokens=2"), names)  # noqa: S102
    asked = prompts.Question(fields=dict.fromkeys(told.prompt.names, "..."))
    expected = prompts.encode(base.tokenizer(tiny_base), asked, told.prompt)
    assert names["inputs"]["input_ids"][0].tolist() == expected


def test_programs_switch_reasoning_as_the_settings_do() -> None:
    told = facts(prompt=Prompt(thinking=False))
    begin, end = "inputs = tokenizer.apply_chat_template(", ").to(model.device)"
    call = card.transformers_snippet(told).partition(begin)[2].partition(end)[0]
    tokenizer = tokenizer_of(SHAPES["qwen3"])
    asked = [{"role": "user", "content": "..."}]
    given = eval(f"tokenizer.apply_chat_template({call})", {"tokenizer": tokenizer, "messages": asked})  # noqa: S307
    assert given["input_ids"][0].tolist() == prompts.encode(tokenizer, prompts.Question("..."), told.prompt)
    assert "chat_template_kwargs={'enable_thinking': False, 'thinking': False}" in card.vllm_snippet(told)


@pytest.mark.slow
def test_programs_without_a_chat_template(tiny_base: Path) -> None:
    told = facts(has_chat_template=False)
    program = card.transformers_snippet(told).replace('"my-team/queries"', repr(str(tiny_base)))
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(program.replace("max_new_tokens=256", "max_new_tokens=2"), names)  # noqa: S102
    asked = prompts.Question(fields={"question": "...", "columns": "..."})
    expected = prompts.encode(variant(base.tokenizer(tiny_base), None), asked, told.prompt)
    assert names["inputs"]["input_ids"][0].tolist() == expected
    assert "llm.generate(prompt, sampling)" in card.vllm_snippet(replace(told, prompt=Prompt()))


@pytest.mark.slow
@pytest.mark.server
def test_the_vllm_program_answers_as_trained(
    trained_weights: Path, answered: list[dict[str, Any]], tmp_path: Path
) -> None:
    row = answered[0]["prompt"]
    # Compiled mode gives wrong answers on some CPUs.
    where = f"{str(trained_weights)!r}, enforce_eager=True, max_model_len=1024"
    where += f", distributed_executor_backend={vllm.EXECUTOR!r}"
    program = card.vllm_snippet(facts()).replace('"my-team/queries"', where)
    filled = program.replace(
        'question="...", columns="..."', f"question={row['question']!r}, columns={chr(10).join(row['columns'])!r}"
    )
    assert filled != program
    path = tmp_path / "ask.py"
    path.write_text(filled)
    # In one process: each further one would import vLLM again.
    environment = {**os.environ, **vllm.environment(config.Serve(), cuda=False), "PYTHONPATH": str(ROOT)}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    # vLLM logs to the same stream.
    assert answered[0]["answer"] in done.stdout.splitlines()
