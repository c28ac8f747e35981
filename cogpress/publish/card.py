"""The model card of published weights: `README.md` with the metadata that the Hub reads.

No text of a user can break the page, and examples are counted but not shown unless asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cogpress import prompts
from cogpress.config import Config, Prompt
from cogpress.publish.licence import Licence, Origin

_HELD = {"nf4": "4 bits (NF4, double quantization)", "int8": "8 bits (LLM.int8())"}
"""How training stored the base's linear layers."""


@dataclass(frozen=True)
class CardFacts:
    """The facts of a card; what is None or empty is left out.

    Attributes:
        repo: organisation/name.
        branch: the branch to publish on.
        origin: the base model.
        licence: of the weights.
        prompt: the prompt's settings.
        has_chat_template: whether the tokenizer has a chat template.
        manifest: of the weights.
        verification: the passed report on these weights.
        unverified: why they are not verified.
        config: of the run that made them.
        result: what training measured.
        data: the report on the examples.
        divergence: of `merged`, and where it was measured of `naive`, from what training scored.
        exact_match: shares of correct answers of `base` and `tuned`, and the number of `questions`.
        answers: examples to show.
    """

    repo: str
    branch: str
    origin: Origin
    licence: Licence
    prompt: Prompt
    has_chat_template: bool
    manifest: dict[str, Any]
    verification: dict[str, Any] | None = None
    unverified: str | None = None
    config: Config | None = None
    result: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    divergence: dict[str, Any] = field(default_factory=dict)
    exact_match: dict[str, Any] = field(default_factory=dict)
    answers: Sequence[dict[str, str]] = ()


def write(facts: CardFacts) -> str:
    """The whole card."""
    sections = [
        f"---\n{_metadata(facts)}---",
        f"# {escaped(facts.repo.partition('/')[2])}",
        _unverified(facts),
        _summary(facts),
        _use(facts),
        _quality(facts),
        _training(facts),
        _data(facts),
        _examples(facts),
        _licence(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def page(facts: CardFacts) -> str:
    """The card for a page where the model itself runs: what it is, how good, how made, under what terms."""
    sections = [_summary(facts), _quality(facts), _training(facts), _data(facts), _licence(facts)]
    return "\n\n".join(section for section in sections if section) + "\n"


def escaped(text: Any) -> str:
    """Text as one line of literal Markdown: no markup, HTML, cell or line break."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#|~&!$])", r"\\\1", line)


def fenced(text: str, language: str = "") -> str:
    """A code block with a fence longer than any run of backticks inside it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table with escaped cells; if there is a header, the columns after the first are right-aligned."""
    numbers = ["---:" if any(header) else "---"] * (len(header) - 1)
    lines = [header, ["---", *numbers], *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    adapted = "lora" if facts.manifest.get("quantization") in (None, "none") else "qlora"
    data = ModelCardData(
        license=facts.licence.identifier,
        license_name=facts.licence.name,
        license_link=facts.licence.link,
        language=list(facts.origin.languages) or None,
        base_model=facts.origin.hub_name,
        base_model_relation="finetune" if facts.origin.hub_name else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["cogpress", adapted],
    )
    return f"{data.to_yaml()}\n"


def _unverified(facts: CardFacts) -> str:
    if facts.unverified is None:
        return ""
    return f"> **These weights are unverified: {escaped(facts.unverified)}.**"


def _base(facts: CardFacts) -> str:
    name = facts.origin.hub_name
    return f"[{escaped(name)}](https://huggingface.co/{name})" if name else f"**{escaped(facts.origin.shown)}**"


def _summary(facts: CardFacts) -> str:
    quantization = str(facts.manifest.get("quantization"))
    how = f"{'QLoRA' if quantization in _HELD else 'LoRA'} on the base in {_HELD.get(quantization, '16 bits')}"
    merge = facts.manifest.get("merge") or {}
    onto = {
        "dequantized": "the base as training saw it (quantized, then dequantized), so that it answers as trained",
        "balanced": "the original weights with as much of the quantization's error as the task needs, so that it "
        "answers as trained and forgets less",
        "original": "the original weights",
    }.get(str(merge.get("onto")), "the base")
    return (
        f"{_base(facts)}, fine-tuned with cogpress: {how}. The adapter is merged onto {onto}. Complete weights in "
        "safetensors: no adapter to load, no code to trust. `manifest.json` lists the sha256 of every file."
    )


def _use(facts: CardFacts) -> str:
    fields = facts.prompt.names
    named = ", ".join(f"`{name}`" for name in fields)
    several = f" Its fields are {named}; write a list with one item a line." if len(fields) > 1 else ""
    return "\n\n".join(
        [
            "## Use",
            f"The model was trained on the prompt below and answers it best.{several}",
            f"With transformers:\n\n{fenced(transformers_snippet(facts), 'python')}",
            f"With vLLM:\n\n{fenced(vllm_snippet(facts), 'python')}",
            "With cogpress, as the base of another training, in `model.yaml`:\n\n"
            + fenced(f"base:\n  source: hf://{facts.repo}{_at(facts)}", "yaml"),
        ]
    )


def _at(facts: CardFacts) -> str:
    return "" if facts.branch == "main" else f"@{facts.branch}"


def _revision(facts: CardFacts) -> str:
    return "" if facts.branch == "main" else f", revision={_literal(facts.branch)}"


def _literal(text: str) -> str:
    """Text as a one-line Python string literal, which every JSON string is."""
    return json.dumps(text, ensure_ascii=False)


def _asking(facts: CardFacts) -> list[str]:
    """Python that fills the template and makes the messages or text for the model."""
    values = ", ".join(f'{name}="..."' for name in facts.prompt.names)
    lines = [f"template = {_literal(facts.prompt.template)}", f"prompt = template.format({values})"]
    mark = "\0"  # stands for the variable `prompt`
    asked = prompts.conversation(prompts.Question(messages=[{"role": "user", "content": mark}]), facts.prompt)
    if not facts.has_chat_template:
        before = prompts.plain_prompt(asked).removesuffix(mark)
        return [*lines, f"prompt = {_literal(before)} + prompt"] if before else lines
    contents = ["prompt" if message["content"] == mark else _literal(message["content"]) for message in asked]
    messages = [
        f'{{"role": {_literal(message["role"])}, "content": {content}}}'
        for message, content in zip(asked, contents, strict=True)
    ]
    return [*lines, f"messages = [{', '.join(messages)}]"]


def _switches(facts: CardFacts) -> dict[str, bool]:
    """The settings' reasoning, by each name that a template may have for it; templates ignore the others."""
    return {} if facts.prompt.thinking is None else dict.fromkeys(prompts.SWITCHES, facts.prompt.thinking)


def transformers_snippet(facts: CardFacts) -> str:
    """A Python program that asks the model once with transformers."""
    where = f"{_literal(facts.repo)}{_revision(facts)}"
    encode = ['inputs = tokenizer(prompt, return_tensors="pt").to(model.device)']
    if facts.has_chat_template:
        encode = [
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
            + "".join(f", {name}={value}" for name, value in _switches(facts).items()),
            ").to(model.device)",
        ]
    return "\n".join(
        [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"tokenizer = AutoTokenizer.from_pretrained({where})",
            f'model = AutoModelForCausalLM.from_pretrained({where}, dtype="auto", device_map="auto")',
            *_asking(facts),
            *encode,
            "output = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    )


def vllm_snippet(facts: CardFacts) -> str:
    """A Python program that asks the model once with vLLM."""
    switches = f", chat_template_kwargs={_switches(facts)}" if _switches(facts) else ""
    ask = f"llm.chat(messages, sampling{switches})" if facts.has_chat_template else "llm.generate(prompt, sampling)"
    body = [
        f"llm = LLM({_literal(facts.repo)}{_revision(facts)})",
        "sampling = SamplingParams(temperature=0, max_tokens=256)",
        *_asking(facts),
        f"print({ask}[0].outputs[0].text)",
    ]
    # vLLM may start its engine in a process of its own, which imports this program again.
    guarded = ['if __name__ == "__main__":', *(f"    {line}" for line in body)]
    return "\n".join(["from vllm import LLM, SamplingParams", "", *guarded])


def _quality(facts: CardFacts) -> str:
    parts = []
    if facts.exact_match:
        found = facts.exact_match
        rows = [
            (f"exact match, {found['questions']} held-out questions", *map(_share, (found["base"], found["tuned"])))
        ]
        parts.append(table(["", "base", "this model"], rows))
    if facts.divergence:
        rows = [
            (name, _number(value["mean_kl"]), _number(value["p99_kl"]), _share(value["top1_agreement"]))
            for name, value in (
                ("this model", facts.divergence["merged"]),
                ("the usual merge, onto the original weights", facts.divergence.get("naive")),
            )
            if value
        ]
        tokens = facts.divergence["merged"]["tokens"]
        parts.append(
            f"Distance of these weights from the model that training scored, on {tokens:,} answer tokens (KL "
            "divergence in nats):\n\n" + table(["", "mean KL", "99th percentile", "same top token"], rows)
        )
    if facts.verification is not None:
        parts += _verified(facts.verification)
    return "\n\n".join(["## Quality", *parts]) if parts else ""


def _verified(report: dict[str, Any]) -> list[str]:
    parts = []
    checks = [check for check in report.get("checks") or [] if isinstance(check, dict)]
    if checks:
        rows = [
            (
                check.get("name"),
                _number(check.get("value")),
                _number(check.get("limit")),
                "yes" if check.get("passed") else "no",
            )
            for check in checks
        ]
        parts.append(
            f"Verified on {escaped(str(report.get('created_at', ''))[:10])}, these very files:\n\n"
            + table(["check", "value", "limit", "passed"], rows)
        )
    metrics = [(name, _number(value)) for name, value in _flat(report.get("metrics") or {})]
    if metrics:
        parts.append(table(["measured", "value"], metrics))
    return parts


def _flat(metrics: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{name}, ")
        elif value is None or isinstance(value, bool | int | float | str):
            yield f"{before}{name}".replace("_", " "), value


def _training(facts: CardFacts) -> str:
    if facts.config is None:
        return ""
    train, result = facts.config.train, facts.result
    layers = {"all-linear": "all linear layers"}.get(train.target_modules, train.target_modules)
    rows: list[tuple[str, Any]] = [
        ("base held in", _HELD.get(facts.config.base.quantization, "16 bits")),
        ("computed in", facts.manifest.get("compute_dtype") or "-"),
        ("adapter", f"LoRA, rank {train.rank}, alpha {train.lora_alpha:g}, dropout {train.dropout:g}, on {layers}"),
        ("learning rate", f"{train.learning_rate:g}, {train.schedule}, {train.warmup_share:.0%} warm-up"),
        ("rows of a step", train.batch_size * train.gradient_accumulation),
        ("longest row", f"{train.max_length:,} tokens"),
        ("weight decay, largest gradient norm", f"{train.weight_decay:g}, {train.max_grad_norm:g}"),
        ("seed", train.seed),
    ]
    if result:
        rows += [
            ("steps", f"{result['steps']:,}"),
            ("tokens", f"{result['tokens']:,}"),
            ("time", f"{result['seconds']:,.0f} s, {result['tokens_per_second']:,.0f} tokens/s"),
            ("training loss", _number(result.get("train_loss"))),
            ("validation loss", _number(result.get("validation_loss"))),
            ("peak memory", f"{result['peak_memory_gb']:.1f} GB"),
        ]
    learnt = "the instruction, written from the response" if facts.config.data.task == "reversed" else "the answers"
    if "text" in facts.data.get("formats", {}):
        learnt += ", and all of a plain text"
    return f"## Training\n\nLearnt: {learnt}.\n\n{table(['', ''], rows)}"


def _data(facts: CardFacts) -> str:
    data = facts.data
    if not data:
        return ""
    left_out = {
        name: data.get(key, 0)
        for name, key in (
            ("bad lines", "bad_lines"),
            ("empty answers", "empty_answers"),
            ("duplicates", "duplicates"),
            ("too long", "too_long"),
            ("prompts in both splits", "leaked"),
        )
    }
    rows = [
        ("examples read", f"{data['lines']:,}"),
        ("trained on", f"{data['train']:,}"),
        ("held out for validation", f"{data['validation']:,}"),
        ("left out", ", ".join(f"{count:,} {name}" for name, count in left_out.items() if count) or "none"),
        ("tokens, and of these learnt", f"{data['tokens']:,}, {data['learnt_tokens']:,}"),
        (
            "tokens of an example: median, 95th percentile, longest",
            f"{data['length_p50']:,}, {data['length_p95']:,}, {data['length_max']:,}",
        ),
    ]
    return f"## Data\n\nThe examples are not published; these are their counts.\n\n{table(['', ''], rows)}"


def _examples(facts: CardFacts) -> str:
    if not facts.answers:
        return ""
    shown = [
        f"Asked:\n\n{fenced(row['prompt'])}\n\nAnswered:\n\n{fenced(row['tuned'])}\n\nExpected:\n\n{fenced(row['expected'])}"
        for row in facts.answers
    ]
    return "\n\n".join(["## Examples", "From the validation data, which training did not see.", *shown])


def _licence(facts: CardFacts) -> str:
    own, theirs = facts.licence, facts.origin.licence
    text = f"These weights: {_licence_named(own)}."
    if theirs is not None:
        text += f" The base model: {_licence_named(theirs)}."
    return f"## Licence\n\n{text}"


def _licence_named(licence: Licence) -> str:
    name = escaped(licence.name or licence.identifier)
    return f"[{name}](<{licence.link}>)" if licence.link else name


def _share(value: float) -> str:
    return f"{value:.1%}"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.5f}" if 1e-5 <= abs(value) < 10 else f"{value:,.6g}"
    return str(value)
