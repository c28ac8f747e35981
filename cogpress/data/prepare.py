"""A file of examples, turned into checked, tokenized training rows before any model loads.

Knows what is left out and why, the split into training and validation, and the report on both. Reading a file is
`cogpress.data.read`'s, which tokens are learnt `cogpress.data.tokenize`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from cogpress import config
from cogpress.data.example import BadExample, Example, Turn, check_task
from cogpress.data.read import Problem, read
from cogpress.data.tokenize import NO_LOSS, Row, all_stops, tokenize
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBLEMS_SHOWN = 20
SMALLEST_SPLIT = 20
"""From this many examples on, a validation share above zero gives at least one validation example."""


@dataclass(slots=True)
class Report:
    """What was found in the data and what was done about it; lengths are in tokens, before anything was cut."""

    lines: int = 0
    problems: list[Problem] = field(default_factory=list)
    formats: dict[str, int] = field(default_factory=dict)
    empty_answers: int = 0
    duplicates: int = 0
    cut: int = 0
    too_long: int = 0
    no_room: int = 0
    """Of the too long ones, those whose prompt alone fills the sequence, so that no answer token would be left."""
    leaked: int = 0
    near_leaked: int = 0
    """Of the leaked ones, those whose prompt is the same only but for case and white space."""
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
    """Every distinct example's length, for a histogram."""

    def to_dict(self) -> dict[str, Any]:
        """Everything that fits a log, as JSON types: the first problems and their count, and no `lengths`."""
        return {
            "lines": self.lines,
            "bad_lines": len(self.problems),
            "first_bad_lines": [
                {"file": problem.file, "line": problem.line, "reason": problem.reason}
                for problem in self.problems[:PROBLEMS_SHOWN]
            ],
            "formats": dict(self.formats),
            "empty_answers": self.empty_answers,
            "duplicates": self.duplicates,
            "cut": self.cut,
            "too_long": self.too_long,
            "no_room": self.no_room,
            "leaked": self.leaked,
            "near_leaked": self.near_leaked,
            "train": self.train,
            "validation": self.validation,
            "tokens": self.tokens,
            "learnt_tokens": self.learnt_tokens,
            "max_length": self.max_length,
            "length_p50": self.length_p50,
            "length_p95": self.length_p95,
            "length_max": self.length_max,
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """The report for a terminal: what was counted, how often, and what was done about it."""
        table = Table(title="Examples", title_justify="left")
        table.add_column("what", no_wrap=True)
        table.add_column("count", justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        formats = ", ".join(f"{count:,} {name}" for name, count in self.formats.items())
        keeps = f"; max_length {self.length_max:,} would keep all" if self.too_long or self.cut else ""
        near = f"{self.near_leaked:,} of them but for case and white space; " if self.near_leaked else ""
        share = self.learnt_tokens / self.tokens if self.tokens else 0.0
        rows = [
            ("lines", self.lines, formats),
            ("bad lines", len(self.problems), "left out" if self.problems else ""),
            ("empty answers", self.empty_answers, "left out" if self.empty_answers else ""),
            ("duplicates", self.duplicates, "kept once" if self.duplicates else ""),
            ("too long", self.too_long, f"left out: over {self.max_length:,} tokens{keeps}" if self.too_long else ""),
            ("cut", self.cut, f"text, cut at {self.max_length:,} tokens{keeps}" if self.cut else ""),
            ("prompt in both", self.leaked, f"{near}left out of validation" if self.leaked else ""),
            ("training", self.train, "examples"),
            ("validation", self.validation, "examples"),
            ("tokens", self.tokens, f"{self.learnt_tokens:,} of them learnt ({share:.0%})"),
            ("median length", self.length_p50, f"tokens; 95 % up to {self.length_p95:,}, all to {self.length_max:,}"),
        ]
        for what, count, done in rows:
            table.add_row(what, f"{count:,}", Text(done))
        if self.notes or self.problems:
            table.add_section()
        for note in self.notes:
            table.add_row("note", "", Text(note))
        for problem in self.problems[:PROBLEMS_SHOWN]:
            table.add_row("bad line", f"{problem.line:,}", Text(f"{problem.file}: {problem.reason}"))
        if len(self.problems) > PROBLEMS_SHOWN:
            table.add_row("bad lines", f"{len(self.problems) - PROBLEMS_SHOWN:,}", "more")
        return table


@dataclass(frozen=True, slots=True)
class Prepared:
    """Rows and the examples they came from, in the same order."""

    train: list[Row]
    validation: list[Row]
    train_examples: list[Example]
    validation_examples: list[Example]
    report: Report


def held_out(prepared: Prepared) -> str:
    """The examples that are not trained on, as JSONL of conversations; those of plain text are none."""
    rows = [
        {"messages": [turn._asdict() for turn in example.messages]}
        for example in prepared.validation_examples
        if example.messages
    ]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class BadDataError(CogpressError):
    """The examples cannot be trained on as they are; `report` tells what was found up to there."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report


# --- preparing --------------------------------------------------------------------------------------------------------


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
    teach the model to stop anywhere. A longer `text` is cut. Validation is `validation_path`, less the examples whose
    prompt is also trained on, else `data.validation_share` of the examples.

    Args:
        tokenizer: the base model's, whose chat template wraps the examples.
        data: only `task` and `validation_share` are used; the files are `path` and `validation_path`.
        max_length: the longest row, in tokens.
        seed: chooses which examples validate.
        skip_bad: leave bad lines out instead of refusing the file.
        stop_ids: the ids besides the tokenizer's end token on which generation stops, where the model says so.

    Raises:
        BadDataError: there are bad lines, or nothing is left to train on or to validate with.
        CogpressError: a file cannot be read, or the chat template cannot be trained with.
    """
    check_task(prompt, data.task)
    report = Report(max_length=max_length)
    stops = all_stops(tokenizer, stop_ids)
    train = _load(path, tokenizer, prompt, data.task, stops, report)
    validation = _load(validation_path, tokenizer, prompt, data.task, stops, report) if validation_path else []
    if report.problems and not skip_bad:
        raise BadDataError(_refusal(report), report)
    if not tokenizer.chat_template:
        report.notes.append("the tokenizer has no chat template: prompt, completion and end token are simply joined")

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
        validation=[row for _, row in validation],
        train_examples=[example for example, _ in train],
        validation_examples=[example for example, _ in validation],
        report=report,
    )


_Pair = tuple[Example, Row]


def _load(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompt: config.Prompt,
    task: str,
    stops: frozenset[int],
    report: Report,
) -> list[_Pair]:
    """A file's usable examples with their rows, uncut; what was wrong goes into the report."""
    reading = read(path, prompt=prompt, task=task)
    pairs: list[_Pair] = []
    problems = list(reading.problems)
    for example in reading.examples:
        try:
            pairs.append((example, tokenize(tokenizer, example, stops)))
        except BadExample as bad:
            problems.append(Problem(example.line, str(bad), path.name))
    report.lines += reading.lines
    report.empty_answers += reading.empty_answers
    report.problems += sorted(problems, key=lambda problem: problem.line)
    formats = Counter(report.formats)
    formats.update(example.format for example in reading.examples)
    report.formats = dict(formats.most_common())
    return pairs


def _refusal(report: Report) -> str:
    shown = "; ".join(str(problem) for problem in report.problems[:5])
    more = f"; and {len(report.problems) - 5:,} more" if len(report.problems) > 5 else ""
    count = f"{len(report.problems):,} of {report.lines:,} lines cannot be used"
    return f"{count}: {shown}{more}. Correct them, or leave them out with --skip-bad-lines."


def _losses(report: Report) -> str:
    counts = [
        (report.problems, len(report.problems), "bad lines"),
        (report.empty_answers, report.empty_answers, "empty answers"),
        (report.too_long, report.too_long, f"longer than {report.max_length:,} tokens"),
        (report.leaked, report.leaked, "with a prompt that is also trained on"),
    ]
    said = ", ".join(f"{count:,} {what}" for present, count, what in counts if present)
    return f"of {report.lines:,} lines, {said or 'all went to the other part'}"


def _distinct(pairs: Sequence[_Pair], report: Report) -> list[_Pair]:
    seen: set[tuple[tuple[Turn, ...] | None, str | None]] = set()
    kept: list[_Pair] = []
    for example, row in pairs:
        content = (example.messages, example.text)
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
        elif example.text is not None:
            report.cut += 1
            kept.append((example, Row(row.input_ids[:max_length], row.labels[:max_length])))
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


def split(examples: Sequence[Example], share: float, seed: int) -> set[int]:
    """Indices of the examples that validate: `share` of them, and never a prompt that is also trained on.

    Prompts that differ only in case or white space count as one. The choice depends on seed and prompts, not on the
    order of the file. Where examples share prompts the share is met as nearly as whole groups allow.
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
        chosen.update(smallest)  # more than asked for, at most half, and better than none
    return chosen


def _asked(example: Example) -> str:
    """What makes two examples the same question."""
    return example.text if example.text is not None else example.prompt


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


def _draw(prompt: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\0{prompt}".encode(), digest_size=16).digest()
