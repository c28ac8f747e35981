"""A file of examples as checked, split and tokenized training rows, with a report, before any model loads."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cogpress import config, prompts
from cogpress.data.example import KEYS, EmptyAnswer, Example, NoWeight, UnreadKeysError, example_of, row_of
from cogpress.data.read import BadRow, rows, short
from cogpress.errors import CogpressError
from cogpress.prompts import NO_LOSS, Conversation, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBLEMS_SHOWN = 20
_CHAT_MARKS = re.compile(
    r"\[/?INST\]|<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|assistant)\|>"
    r"|^### ?(?:Human|Assistant|Instruction|Response):",
    re.MULTILINE,
)
"""What chat templates write around turns, and what data made for plain text models has in their place."""

SMALLEST_SPLIT = 20
"""From this many examples on, a validation share above zero gives at least one validation example."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a row cannot be used. `line` counts from 1: lines of JSONL, items of a JSON list, rows of Parquet."""

    line: int
    reason: str
    file: str

    def __str__(self) -> str:
        return f"{self.file} line {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one file holds. `lines` counts its rows, good and bad, and not its blank lines."""

    examples: list[Example]
    conversations: list[Conversation]
    """The examples with the prompt settings applied, in the same order."""
    problems: list[Problem]
    lines: int
    empty_answers: int
    weightless: int = 0
    """Rows of weight 0."""
    unread_keys: Counter[str] = field(default_factory=Counter)
    """Rows by key that has no meaning here; they are among the problems."""
    ignored_keys: Counter[str] = field(default_factory=Counter)
    """Rows by key that `data.ignore` names."""


@dataclass(slots=True)
class Report:
    """What was found in the data and what was done about it; lengths are in tokens, before any cut."""

    lines: int = 0
    problems: list[Problem] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    unread_keys: dict[str, int] = field(default_factory=dict)
    """Rows by key that has no meaning here; they are bad lines."""
    ignored_keys: dict[str, int] = field(default_factory=dict)
    """Rows by key that `data.ignore` names."""
    empty_answers: int = 0
    weightless: int = 0
    """Rows of weight 0, which are not learnt."""
    duplicates: int = 0
    cut: int = 0
    too_long: int = 0
    no_room: int = 0
    """Of the too long ones, those whose prompt alone fills the sequence, so that no answer token fits."""
    leaked: int = 0
    near_leaked: int = 0
    """Of the leaked ones, those whose prompt differs in case or white space."""
    train: int = 0
    validation: int = 0
    tokens: int = 0
    learnt_tokens: int = 0
    max_length: int = 0
    length_p50: int = 0
    length_p95: int = 0
    length_max: int = 0
    """The `max_length` that would keep every example whole."""
    notes: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list, repr=False)
    """Length of every distinct example, for a histogram."""

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types: the number of problems and the first of them, without `lengths`."""
        told = asdict(self)
        problems = told.pop("problems")
        del told["lengths"]
        counted = {"lines": self.lines, "bad_lines": len(problems), "first_bad_lines": problems[:PROBLEMS_SHOWN]}
        return {**counted, **told}

    def table(self) -> Table:
        """The report for a terminal."""
        table = Table(title="Examples", title_justify="left")
        table.add_column("what", no_wrap=True)
        table.add_column("count", justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for what, count, done in self.told():
            if what in ("note", "bad line") and table.rows and not any(row.end_section for row in table.rows):
                table.add_section()
            table.add_row(what, count, Text(done))
        return table

    def told(self) -> list[tuple[str, str, str]]:
        """The report in words: what was found, how many, and what was done about it."""
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        keeps = f"; max_length {self.length_max:,} would keep all" if self.too_long or self.cut else ""
        near = f"{self.near_leaked:,} of them with other case or white space; " if self.near_leaked else ""
        share = self.learnt_tokens / self.tokens if self.tokens else 0.0
        rows = [
            ("lines", self.lines, formats),
            ("bad lines", len(self.problems), "left out" if self.problems else ""),
            ("empty answers", self.empty_answers, "left out" if self.empty_answers else ""),
            ("weight 0", self.weightless, "left out" if self.weightless else ""),
            ("duplicates", self.duplicates, "kept once" if self.duplicates else ""),
            ("too long", self.too_long, f"left out: over {self.max_length:,} tokens{keeps}" if self.too_long else ""),
            ("cut", self.cut, f"text, cut at {self.max_length:,} tokens{keeps}" if self.cut else ""),
            ("prompt in both", self.leaked, f"{near}left out of validation" if self.leaked else ""),
            ("training", self.train, "examples"),
            ("validation", self.validation, "examples"),
            ("tokens", self.tokens, f"{self.learnt_tokens:,} of them learnt ({share:.0%})"),
            ("median length", self.length_p50, f"tokens; 95 % up to {self.length_p95:,}, all to {self.length_max:,}"),
        ]
        told = [(what, f"{count:,}", done) for what, count, done in rows if count or what != "weight 0"]
        for names, done in ((self.unread_keys, "would not be read"), (self.ignored_keys, "left out by data.ignore")):
            told += [("lines with a key", f"{count:,}", f"{short(name)}: {done}") for name, count in names.items()]
        told += [("note", "", note) for note in self.notes]
        shown = self.problems[:PROBLEMS_SHOWN]
        told += [("bad line", f"{problem.line:,}", f"{problem.file}: {problem.reason}") for problem in shown]
        if more := len(self.problems) - len(shown):
            told.append(("bad lines", f"{more:,}", "more"))
        return told


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows and the examples they came from, in the same order."""

    train: list[Row]
    validation: list[Row]
    train_examples: list[Conversation]
    validation_examples: list[Conversation]
    report: Report


SAMPLE = 32
"""Examples in `sample`."""


def held_out(prepared: Prepared) -> str:
    """The validation conversations as JSONL, without plain texts."""
    return _lines([example for example in prepared.validation_examples if example.messages])


def sample(prepared: Prepared) -> str:
    """Some of the training examples as JSONL, chosen by chance, always the same."""
    found = prepared.train_examples
    return _lines([found[at] for at in sorted(random.Random(0).sample(range(len(found)), min(SAMPLE, len(found))))])


def _lines(examples: Iterable[Conversation]) -> str:
    rows = [
        {"messages": _weighted(example), **({"tools": list(example.tools)} if example.tools else {})}
        if example.messages
        else {"text": example.text}
        for example in examples
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _weighted(example: Conversation) -> list[dict[str, Any]]:
    """The messages, with weight 0 where an assistant's is not learnt."""
    return [
        {**message, "weight": 0} if message["role"] == "assistant" and not example.learns(index) else dict(message)
        for index, message in enumerate(example.messages)
    ]


class BadDataError(CogpressError):
    """The examples cannot be trained on; `report` has what was found so far."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report


# --- reading ----------------------------------------------------------------------------------------------------------


def read_examples(
    path: Path,
    *,
    prompt: config.Prompt | None = None,
    task: config.Task = "answer",
    ignore: Sequence[str] = (),
    rename: Mapping[str, str] = MappingProxyType({}),
) -> Reading:
    """Read and check a file of examples and apply the prompt settings; problems are collected, not raised.

    Args:
        path: the file.
        prompt: the settings.
        task: what is learned.
        ignore: keys to leave out, of rows, of messages and of a prompt's fields. Other keys without a meaning are a
            problem of their row.
        rename: names of rows' keys, and what they are called here.

    Raises:
        CogpressError: the file cannot be read, is of no known kind or has no rows; a new name is none that is read; or
            the template has several fields,
            and the task is `reversed`, which asks with one text.
    """
    prompt = prompt or config.Prompt()
    fields = prompt.names
    if task == "reversed" and len(fields) != 1:
        raise CogpressError(
            f"data.task: reversed asks with one text, but prompt.template has the fields {', '.join(fields)}. "
            "Give it a template with one field."
        )
    if unknown := [name for name in rename.values() if name not in KEYS]:
        raise CogpressError(f"data.rename names {unknown[0]}, which is no key of a row. Choose from {', '.join(KEYS)}.")
    reading = Reading([], [], [], lines=0, empty_answers=0)
    lines = empty = weightless = 0
    for line, item in rows(path, (*KEYS, *rename), ignore):
        lines += 1
        try:
            if isinstance(item, BadRow):
                raise item
            row, left = row_of(item, ignore, rename)
            reading.ignored_keys.update(left)
            example = example_of(row, line, task)
            conversation = _conversation(example, prompt)
        except EmptyAnswer:
            empty += 1
        except NoWeight:
            weightless += 1
        except RecursionError:
            reading.problems.append(Problem(line, "nested too deeply", path.name))
        except BadRow as bad:
            reading.problems.append(Problem(line, str(bad), path.name))
            if isinstance(bad, UnreadKeysError):
                reading.unread_keys.update(bad.names)
        except CogpressError as error:
            reading.problems.append(Problem(line, str(error).rstrip("."), path.name))
        else:
            reading.examples.append(example)
            reading.conversations.append(conversation)
    if not lines:
        raise CogpressError(f"{path} holds no examples. Give one JSON object per line, or one Parquet row each.")
    return replace(reading, lines=lines, empty_answers=empty, weightless=weightless)


def _conversation(example: Example, prompt: config.Prompt) -> Conversation:
    if example.text:
        return Conversation(text=example.text, weight=example.weight)
    made = prompts.with_answer(example.question, prompt, example.answer, example.unlearnt)
    return replace(made, weight=example.weight)


# --- preparing --------------------------------------------------------------------------------------------------------


def prepare_as(
    settings: config.Config,
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    *,
    validation_path: Path | None,
    skip_bad: bool,
) -> Prepared:
    """`prepare` with the options of `model.yaml`."""
    return prepare(
        path,
        tokenizer=tokenizer,
        prompt=settings.prompt,
        data=settings.data,
        max_length=settings.train.max_length,
        seed=settings.train.seed,
        validation_path=validation_path,
        skip_bad=skip_bad,
        stop_ids=stop_ids,
    )


def prepare(
    path: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    prompt: config.Prompt,
    data: config.Data,
    max_length: int,
    seed: int,
    validation_path: Path | None = None,
    skip_bad: bool = False,
    stop_ids: Collection[int] = (),
) -> Prepared:
    """Read, check, split and tokenize examples.

    Empty answers are left out, duplicates kept once, and chats longer than `max_length` left out: a cut answer would
    teach the model to stop anywhere. A longer plain text is cut. Validation is `validation_path` without the prompts
    that are also trained on, else `data.validation_share` of the examples.

    Args:
        path: the examples.
        tokenizer: the base model's, with its chat template.
        prompt: the system text and the template.
        data: only `task`, `ignore`, `rename` and `validation_share` are used.
        max_length: of a row, in tokens.
        seed: chooses the validation examples.
        validation_path: examples to validate with.
        skip_bad: leave bad lines out instead of refusing the file.
        stop_ids: ids on which the model stops generating, besides the tokenizer's end token.

    Raises:
        BadDataError: there are bad lines, or nothing is left to train on or to validate with.
        CogpressError: a file cannot be read, or the chat template cannot be trained with.
    """
    report = Report(max_length=max_length)
    ends = prompts.stops(tokenizer, stop_ids)
    train = _load(path, tokenizer, prompt, data, ends, report)
    validation = _load(validation_path, tokenizer, prompt, data, ends, report) if validation_path else []
    if report.problems and not skip_bad:
        raise BadDataError(refusal(report), report)
    if not tokenizer.chat_template:
        report.notes.append("the tokenizer has no chat template: prompt, completion and end token are joined")
    if marked := sum(bool(_CHAT_MARKS.search(example.text)) for example, _ in [*train, *validation]):
        report.notes.append(
            f"{marked:,} plain texts look like chats of another template, questions and marks of which are learnt as "
            "text: give chats as messages"
        )

    train, validation = (_distinct(part, report) for part in (train, validation))
    report.lengths = [len(row.input_ids) for _, row in [*train, *validation]]
    train, validation = (_fitting(part, max_length, report) for part in (train, validation))
    if validation_path:
        validation = _unleaked(train, validation, report)
    else:
        held_out = split([example for example, _ in train], data.validation_share, seed)
        validation = [pair for index, pair in enumerate(train) if index in held_out]
        train = [pair for index, pair in enumerate(train) if index not in held_out]
        if data.validation_share and not validation:
            report.notes.append("too few different prompts to hold any out: there is no validation")

    _count(report, train, validation)
    if not train:
        raise BadDataError(f"{path} leaves nothing to train on: {_losses(report)}.", report)
    if validation_path and not validation:
        raise BadDataError(f"{validation_path} leaves nothing to validate with: {_losses(report)}.", report)
    return Prepared(
        train=[row for _, row in train],
        validation=[replace(row, weight=1.0) for _, row in validation],  # weights are for training
        train_examples=[example for example, _ in train],
        validation_examples=[example for example, _ in validation],
        report=report,
    )


_Pair = tuple[Conversation, Row]


def _load(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: config.Prompt,
    data: config.Data,
    ends: frozenset[int],
    report: Report,
) -> list[_Pair]:
    """A file's usable examples with their rows, uncut; problems and counts go into the report."""
    reading = read_examples(path, prompt=prompt, task=data.task, ignore=data.ignore, rename=data.rename)
    chats = [example.format for example in reading.examples if example.format in ("messages", "conversations")]
    if not tokenizer.chat_template and chats:
        raise CogpressError(
            f"The base model's tokenizer has no chat template, so `{chats[0]}` cannot be trained on. Use the "
            "instruction-tuned variant of the model, or give examples as `prompt` and `completion`."
        )
    pairs: list[_Pair] = []
    problems = list(reading.problems)
    for example, conversation in zip(reading.examples, reading.conversations, strict=True):
        try:
            pairs.append((conversation, prompts.row(tokenizer, conversation, ends)))
        except RecursionError:
            problems.append(Problem(example.line, "nested too deeply", path.name))
        except CogpressError as error:
            problems.append(Problem(example.line, str(error).rstrip("."), path.name))
    report.lines += reading.lines
    report.empty_answers += reading.empty_answers
    report.weightless += reading.weightless
    report.unread_keys = dict((Counter(report.unread_keys) + reading.unread_keys).most_common())
    report.ignored_keys = dict((Counter(report.ignored_keys) + reading.ignored_keys).most_common())
    report.problems += sorted(problems, key=lambda problem: problem.line)
    formats = Counter(report.formats)
    formats.update(example.format for example in reading.examples)
    report.formats = dict(formats.most_common())
    return pairs


def refusal(report: Report) -> str:
    """Why a file with bad lines is refused, and what to do."""
    shown = "; ".join(str(problem) for problem in report.problems[:5])
    more = f"; and {len(report.problems) - 5:,} more" if len(report.problems) > 5 else ""
    count = f"{len(report.problems):,} of {report.lines:,} lines cannot be used"
    refusal = f"{count}: {shown}{more}. Correct them, or leave them out with --skip-bad-lines."
    if report.unread_keys:
        keys = ", ".join(f"{short(name)} ({lines:,})" for name, lines in list(report.unread_keys.items())[:8])
        refusal += f" Keys that would not be read, with their lines: {keys}. Name in data.ignore those without meaning."
    return refusal


def _losses(report: Report) -> str:
    counts = [
        (report.problems, len(report.problems), "bad lines"),
        (report.empty_answers, report.empty_answers, "empty answers"),
        (report.weightless, report.weightless, "of weight 0"),
        (report.too_long, report.too_long, f"longer than {report.max_length:,} tokens"),
        (report.leaked, report.leaked, "with a prompt that is also trained on"),
    ]
    said = ", ".join(f"{count:,} {what}" for present, count, what in counts if present)
    return f"of {report.lines:,} lines, {said or 'all went to the other part'}"


def _distinct(pairs: Sequence[_Pair], report: Report) -> list[_Pair]:
    seen: set[str] = set()
    kept: list[_Pair] = []
    for example, row in pairs:
        content = json.dumps(
            [example.messages, example.text, sorted(example.unlearnt), example.given, example.tools, example.weight]
        )
        if content in seen:
            report.duplicates += 1
        else:
            seen.add(content)
            kept.append((example, row))
    return kept


def _fitting(pairs: Sequence[_Pair], max_length: int, report: Report) -> list[_Pair]:
    kept: list[_Pair] = []
    for example, row in pairs:
        if len(row.input_ids) <= max_length:
            kept.append((example, row))
        elif not example.messages:
            report.cut += 1
            kept.append((example, Row(row.input_ids[:max_length], row.labels[:max_length], row.weight)))
        else:
            report.too_long += 1
            report.no_room += all(label == NO_LOSS for label in row.labels[:max_length])
    return kept


def _unleaked(train: Sequence[_Pair], validation: Sequence[_Pair], report: Report) -> list[_Pair]:
    exact = {_asked(example) for example, _ in train}
    folded = {_folded(asked) for asked in exact}
    kept: list[_Pair] = []
    for example, row in validation:
        asked = _asked(example)
        if _folded(asked) in folded:
            report.leaked += 1
            report.near_leaked += asked not in exact
        else:
            kept.append((example, row))
    return kept


def _count(report: Report, train: Sequence[_Pair], validation: Sequence[_Pair]) -> None:
    rows = [row for _, row in [*train, *validation]]
    report.train, report.validation = len(train), len(validation)
    report.tokens = sum(len(row.input_ids) for row in rows)
    report.learnt_tokens = sum(row.learnt for row in rows)
    lengths = sorted(report.lengths) or [0]
    report.length_p50 = _percentile(lengths, 0.50)
    report.length_p95 = _percentile(lengths, 0.95)
    report.length_max = lengths[-1]


def _percentile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the ascending values does not exceed."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


# --- splitting --------------------------------------------------------------------------------------------------------


def split(examples: Sequence[Conversation], share: float, seed: int) -> set[int]:
    """Indices of the validation examples: `share` of them, and never a prompt that is also trained on.

    Prompts that differ only in case or white space count as one. The choice depends on the seed and the prompts, not on
    the order of the file. Examples with the same prompt stay together, so the share is met approximately.
    """
    wanted = int(share * len(examples) + 0.5)
    if share and len(examples) >= SMALLEST_SPLIT:
        wanted = max(1, wanted)
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_folded(_asked(example)), []).append(index)
    chosen: set[int] = set()
    for prompt in sorted(groups, key=lambda prompt: _draw(prompt, seed)):
        if len(chosen) + len(groups[prompt]) <= wanted:
            chosen.update(groups[prompt])
    if wanted and not chosen and len(groups) > 1:
        smallest = min(groups.values(), key=len)
        chosen.update(smallest)  # more than asked for, at most half, but better than none
    return chosen


def _asked(example: Conversation) -> str:
    """The text that makes two examples the same question."""
    return example.prompt if example.messages else example.text


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _draw(prompt: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{prompt}".encode(), digest_size=16).digest()
