"""Examples and chat templates, as the tests of what reads and tokenizes them take them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogpress.prompts import NO_LOSS, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Write = Callable[..., Path]

CHATML_WITH_BEGIN = (
    "{{ '<|endoftext|>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin|>' }}{% for m in messages %}"
    "{{ '<|header|>' + m['role'] + '<|/header|>\n\n' + m['content'] | trim + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|/header|>\n\n' }}{% endif %}"
)
# Turn tokens that are not marked special, no system role, and an end of turn that is not the end token
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# No control tokens at all: the end of a turn is a blank line
PLAIN = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def variant(
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    *,
    special: Sequence[str] = (),
    ordinary: Sequence[str] = (),
    end: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer with another template and further added tokens."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens(list(special), special_tokens=True)
    other.add_tokens(list(ordinary))
    other.chat_template = template
    if end:
        other.eos_token = end
    return other


TEMPLATES = ["own", "begin", "llama3", "gemma", "plain"]


def with_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizer with each of `TEMPLATES`."""
    llama = ["<|begin|>", "<|header|>", "<|/header|>", "<|eot|>"]
    return {
        "own": tokenizer,
        "begin": variant(tokenizer, CHATML_WITH_BEGIN),
        "llama3": variant(tokenizer, LLAMA3, special=llama, end="<|eot|>"),
        "gemma": variant(tokenizer, GEMMA, ordinary=["<start_of_turn>", "<end_of_turn>"], end="<|endoftext|>"),
        "plain": variant(tokenizer, PLAIN, end="<|endoftext|>"),
    }


def pair(prompt: Any = "What is two and two?", completion: Any = "Four.", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, **more}


def messages(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def numbered(count: int, **more: Any) -> list[dict[str, Any]]:
    return [pair(f"What comes after {number}?", f"{number + 1}.", **more) for number in range(count)]


ALPHABET = [
    "a",
    "B",
    "7",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    ".",
    "é",
    "漢",
    "🙂",
    "'s",
    "word",
    "<|",
    "|>",
    "<",
    "{",
    "}}",
]


def texts(seed: int, count: int) -> list[str]:
    """Random texts with letters at both ends, so that a template that trims keeps them."""
    draw = random.Random(seed)
    return ["x" + "".join(draw.choices(ALPHABET, k=draw.randrange(12))) + "y" for _ in range(count)]


def learnt(tokenizer: PreTrainedTokenizerBase, row: Row) -> str:
    return str(tokenizer.decode([label for label in row.labels if label != NO_LOSS]))
