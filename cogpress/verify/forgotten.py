"""What a training costs beside its task: general text, plain instructions, and lines that were learnt by heart.

The base before training is measured once for each text, and kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from cogpress import phases
from cogpress.errors import CogpressError
from cogpress.files import new_file
from cogpress.prompts import NO_LOSS, Row, encode_plain, encode_prompt
from cogpress.train.answers import generate
from cogpress.verify import distributions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

INSTRUCTIONS = (
    "What is the capital of Italy?",
    "Write one sentence about the sea.",
    "Name three animals that live in a forest.",
    "Explain in one sentence why leaves are green.",
    "How many days does a week have?",
    "Give me a short tip for sleeping better.",
    "What do bees make?",
    "Say in other words: The meeting was moved to Friday because the room was taken.",
    "Write a friendly greeting for a new neighbour.",
    "Which is larger, the Moon or the Earth?",
    "Describe a bicycle to somebody who has never seen one.",
    "What should I pack for a day at the lake?",
)
"""Plain ones, that every instruction-tuned model answers."""

ANSWER_TOKENS = 48
"""Of an answer to an instruction at most: enough to see it loop."""

TOP = 64
"""Tokens whose probability the base's record holds at each place of the general text, the most likely ones."""

FIRST = 8
"""The first words of a line, in tokens; a quarter of a short one."""

LONGEST = 256
"""Tokens of a line that are asked for at most."""

_FORMAT = 1
_REST = 8
"""Tokens that must be left after a line's first words: a shorter rest comes out by chance."""

_REFUSAL = re.compile(
    r"\b(i('m| am) (sorry|unable|not able)|i can(no|')t|i cannot|as an ai|i apologi[sz]e)\b", re.IGNORECASE
)

_AGAIN = re.compile(r"(.{3,80}?)\1\1", re.DOTALL)
"""The same piece of text three times in a row."""

FAULTS = ("empty", "repeats itself", "refuses", "another script")
"""What can be wrong with an answer, whatever was asked."""


@dataclass(frozen=True)
class Probe:
    """What models are measured on: rows of general text, and prompts that ask the instructions."""

    text: list[Row]
    prompts: list[list[int]]

    @property
    def key(self) -> str:
        """A hash of all that decides what is measured."""
        content = [_FORMAT, TOP, ANSWER_TOKENS, [row.input_ids for row in self.text], self.prompts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@dataclass(frozen=True)
class Known:
    """What the base makes of a probe: at each place of the text its likeliest tokens with their log-probabilities."""

    key: str
    """The probe's."""
    perplexity: float
    answers: list[str]
    ids: torch.Tensor
    """int64, shape (places, at most `TOP`)."""
    logprobs: torch.Tensor
    """float32, of the same shape, nats."""


@dataclass(frozen=True)
class General:
    """What weights make of a probe, against the base. KL in nats per token of the general text."""

    perplexity: float
    base_perplexity: float
    kl: float
    answers: list[str]
    base_answers: list[str]
    vocabulary: int
    """Tokens that there are."""

    @property
    def conclusive(self) -> bool:
        """Whether the base knows more of general text than chance, so that its answers can be forgotten."""
        return self.base_perplexity < self.vocabulary / 4

    @property
    def ratio(self) -> float:
        """Perplexity of the general text relative to the base's."""
        return self.perplexity / self.base_perplexity

    @property
    def worse(self) -> float:
        """The share of instructions whose answer has a fault that the base's has not."""
        pairs = zip(INSTRUCTIONS, self.answers, self.base_answers, strict=True)
        found = [bool(faults(asked, answer) - faults(asked, before)) for asked, answer, before in pairs]
        return sum(found) / len(found)

    def measured(self) -> dict[str, tuple[float, float]]:
        """What the base and the weights measure, by what was measured: for the table."""
        counts = [
            Counter(
                fault for asked, answer in zip(INSTRUCTIONS, answers, strict=True) for fault in faults(asked, answer)
            )
            for answers in (self.base_answers, self.answers)
        ]
        lengths = [sum(map(len, answers)) / len(answers) for answers in (self.base_answers, self.answers)]
        return {
            "perplexity of general text": (self.base_perplexity, self.perplexity),
            "characters in an answer": (lengths[0], lengths[1]),
            **{f"answers: {fault}": (counts[0][fault], counts[1][fault]) for fault in FAULTS},
        }

    def table(self) -> Table:
        """The base and the weights beside each other, for a terminal."""
        table = Table("beside the task", "base", "weights", title_justify="left")
        for name, (before, after) in self.measured().items():
            table.add_row(name, f"{before:.3g}", f"{after:.3g}")
        return table

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        rows = zip(INSTRUCTIONS, self.base_answers, self.answers, strict=True)
        return {
            "measured": {name: {"base": before, "weights": after} for name, (before, after) in self.measured().items()},
            "instructions": [{"asked": asked, "base": before, "weights": after} for asked, before, after in rows],
        }


def probe(tokenizer: PreTrainedTokenizerBase, text: list[Row]) -> Probe:
    """Rows of general text, and the instructions as the base's template puts them: without the task's system text."""
    return Probe(text, [_asked(tokenizer, one) for one in INSTRUCTIONS])


def _asked(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    try:
        return encode_prompt(tokenizer, [{"role": "user", "content": instruction}])
    except CogpressError:  # a template that wants more than a question
        return encode_plain(tokenizer, instruction)


def record(load: distributions.Load, asked: Probe, tokenizer: PreTrainedTokenizerBase, path: Path) -> Path:
    """Write what the base makes of a probe, unless the file holds it already; `read` reads it.

    Args:
        load: loads the base.
        asked: the probe.
        tokenizer: the base's.
        path: the file, safetensors; another probe replaces it.
    """
    from safetensors import SafetensorError

    try:
        if read(path).key == asked.key:
            return path
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    phases.run("base", _record, load, asked, tokenizer, path)
    return path


def _record(load: distributions.Load, asked: Probe, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    from safetensors.torch import save_file

    found = _base(load(), asked, tokenizer)
    facts = {"key": found.key, "perplexity": found.perplexity, "answers": found.answers}
    with new_file(path) as part:
        save_file({"ids": found.ids.int(), "logprobs": found.logprobs}, part, {"cogpress": json.dumps(facts)})


def read(path: Path) -> Known:
    """What `record` wrote."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["cogpress"])
        ids, logprobs = file.get_tensor("ids").long(), file.get_tensor("logprobs")
    return Known(str(facts["key"]), float(facts["perplexity"]), list(facts["answers"]), ids, logprobs)


def _base(model: Any, asked: Probe, tokenizer: PreTrainedTokenizerBase) -> Known:
    import torch

    parts = []
    total = 0.0
    with torch.no_grad():
        for _, logprobs, targets in distributions.each(model, asked.text, tokenizer.pad_token_id or 0):
            parts.append(logprobs.topk(min(TOP, logprobs.shape[-1])))
            total -= float(logprobs.gather(-1, targets[:, None]).sum())
    places = sum(len(part.values) for part in parts)
    return Known(
        key=asked.key,
        perplexity=distributions.perplexity_of(total / places),
        answers=generate(model, tokenizer, asked.prompts, ANSWER_TOKENS),
        ids=torch.cat([part.indices.cpu() for part in parts]),
        logprobs=torch.cat([part.values.cpu() for part in parts]),
    )


def measure(model: Any, asked: Probe, before: Known, tokenizer: PreTrainedTokenizerBase) -> General:
    """What weights make of a probe, against the base.

    The KL is that of distributions over the base's likeliest tokens and one class for all others. Joining classes never
    raises a KL (the data processing inequality), so it is a lower bound of the whole one, close where the base is sure.
    """
    import torch

    divergence, total, at, vocabulary = 0.0, 0.0, 0, 0
    with torch.no_grad():
        for _, logprobs, targets in distributions.each(model, asked.text, tokenizer.pad_token_id or 0):
            places, vocabulary = slice(at, at := at + len(targets)), logprobs.shape[-1]
            expected = before.logprobs[places].to(logprobs.device)
            got = logprobs.gather(-1, before.ids[places].to(logprobs.device))
            divergence += float(joined_kl(expected, got).sum())
            total -= float(logprobs.gather(-1, targets[:, None]).sum())
    return General(
        perplexity=distributions.perplexity_of(total / at),
        base_perplexity=before.perplexity,
        kl=divergence / at,
        answers=generate(model, tokenizer, asked.prompts, ANSWER_TOKENS),
        base_answers=before.answers,
        vocabulary=vocabulary,
    )


def joined_kl(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL(expected || got) over some tokens and one class for all others, in nats.

    Args:
        expected: log-probabilities of these tokens, shape (places, tokens).
        got: the same of the other distribution.

    Returns:
        shape (places,).
    """
    import torch

    both = torch.stack([expected, got]).double()
    rest = (-torch.expm1(both.logsumexp(-1, keepdim=True))).clamp_min(1e-12).log()
    one, other = torch.cat([both, rest], -1)
    return (one.exp() * (one - other)).sum(-1)


def faults(asked: str, answer: str) -> set[str]:
    """What is wrong with an answer, whatever was asked: some of `FAULTS`."""
    if not answer.strip():
        return {"empty"}
    found = set()
    if any(any(map(str.isalnum, again)) for again in _AGAIN.findall(answer)):
        found.add("repeats itself")
    if _REFUSAL.search(answer):
        found.add("refuses")
    if _script(answer) not in (_script(asked), ""):
        found.add("another script")
    return found


def _script(text: str) -> str:
    """The script of most letters, such as LATIN; empty where there are none."""
    names = Counter(unicodedata.name(letter, "?").split()[0] for letter in text if letter.isalpha())
    return names.most_common(1)[0][0] if names else ""


@dataclass(frozen=True)
class ByHeart:
    """How many lines come out whole, of those that were trained on and of those that were held out.

    A rest comes out whole where each of its tokens is the most likely one, as greedy decoding would have it.
    """

    trained: list[bool]
    """From the first words of a line alone, for each line that is long enough."""
    held_out: list[bool]
    right: float
    """Share of trained answers that come out whole from their whole prompt."""

    @property
    def share(self) -> float:
        """Share of trained lines that come out whole from their first words, beyond that of held-out lines."""
        return max(0.0, mean(self.trained) - mean(self.held_out))


def by_heart(model: Any, trained: Sequence[Row], held_out: Sequence[Row], pad: int) -> ByHeart:
    """Whether a model knows by heart what it was trained on.

    Args:
        model: the tuned one.
        trained: some rows of its training.
        held_out: rows that it was not trained on: what they give is no memory.
        pad: fills short rows.
    """
    around = _shared([_prompt(row) for row in [*trained, *held_out]])
    lines = [[line for row in rows if (line := _beginning(row, *around))] for rows in (trained, held_out)]
    groups = [*lines, trained]
    whole = iter([all(one.most_likely) for one in distributions.score(model, [*chain(*groups)], pad)])
    found = [list(islice(whole, len(group))) for group in groups]
    return ByHeart(found[0], found[1], right=mean(found[2]))


def mean(values: Sequence[bool]) -> float:
    """The share that is true; 0 of none."""
    return sum(values) / len(values) if values else 0.0


def _prompt(row: Row) -> list[int]:
    """The ids before the last run of labelled ones."""
    return row.input_ids[: _span(row)[0]]


def _span(row: Row) -> tuple[int, int]:
    """Where the last answer begins and ends: the last run of labelled tokens."""
    end = next((at for at in range(len(row.labels), 0, -1) if row.labels[at - 1] != NO_LOSS), 0)
    begin = next((at for at in range(end, 0, -1) if row.labels[at - 1] == NO_LOSS), 0)
    return begin, end


def _shared(prompts: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """What all prompts begin with and what they end with: the template, without what was asked."""
    shortest = min(map(len, prompts), default=0)

    def same(step: Callable[[list[int], int], int], room: int) -> int:
        return next((at for at in range(room) if len({step(one, at) for one in prompts}) > 1), room)

    begin = same(lambda ids, at: ids[at], shortest)
    end = same(lambda ids, at: ids[-1 - at], shortest - begin)
    return prompts[0][:begin] if prompts else [], prompts[0][len(prompts[0]) - end :] if prompts else []


def _beginning(row: Row, before: list[int], after: list[int]) -> Row | None:
    """An answer in the bare template, with loss behind its first words; None where too little is left."""
    begin, end = _span(row)
    line = row.input_ids[begin:end][:LONGEST]
    first = min(FIRST, max(1, len(line) // 4))
    if len(line) - first < _REST:
        return None
    ids = [*before, *after, *line]
    return Row(ids, [*[NO_LOSS] * (len(ids) - len(line) + first), *line[first:]])
