"""A file of examples, turned into checked, tokenized training rows before any model loads.

Knows the four formats, what makes an example bad, the split into training and validation, and which tokens are
learnt. How messages become token ids is `cogpress.chat`'s, shared with serving; batching and padding are training's.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple

from rich.table import Table
from rich.text import Text

from cogpress import chat, config
from cogpress.errors import CogpressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Format = Literal["messages", "prompt/completion", "alpaca", "text"]

NO_LOSS = -100
"""The label of a token that is read and not learnt; the value that PyTorch's cross entropy ignores."""

MAX_LINE_BYTES = 16 * 1024 * 1024
PROBLEMS_SHOWN = 20
SMALLEST_SPLIT = 20
"""From this many examples on, a validation share above zero gives at least one validation example."""

_KEYS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
_MAY_FOLLOW = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_BATCH = 1024  # rows held at once


class Turn(NamedTuple):
    """One message."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One example as read, its system text and prompt template applied: either `messages` or `text` is set."""

    messages: tuple[Turn, ...] | None
    text: str | None
    line: int
    source: str
    format: Format
    context: int = 0
    """So many leading messages are given and never learnt, even an assistant's: the conversation in a `prompt`."""

    @property
    def prompt(self) -> str:
        """What comes before the last answer, without the system text; nothing for `text`."""
        return "\n\n".join(turn.content for turn in (self.messages or ())[:-1] if turn.role != "system")

    @property
    def asked(self) -> list[dict[str, str]]:
        """The messages before the last answer, as `chat.encode_prompt` takes them; none for `text`."""
        return _as_dicts((self.messages or ())[:-1])

    @property
    def answer(self) -> str:
        """The last answer; all of it for `text`."""
        return self.messages[-1].content if self.messages else self.text or ""

    @property
    def system(self) -> str:
        """The system text, empty where there is none."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else ""


@dataclass(frozen=True, slots=True)
class Row:
    """One training sequence: `labels[i]` is `input_ids[i]` where it is learnt, else -100; neither is shifted."""

    input_ids: list[int]
    labels: list[int]

    @property
    def learnt(self) -> int:
        """Number of tokens with loss."""
        return sum(label != NO_LOSS for label in self.labels)


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a line cannot be used. `line` counts from 1: lines of JSONL, items of a JSON list, rows of Parquet."""

    line: int
    reason: str
    file: str

    def __str__(self) -> str:
        return f"{self.file} line {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What one file held. `lines` counts its examples, good and bad, and not its blank lines."""

    examples: list[Example]
    problems: list[Problem]
    lines: int
    empty_answers: int


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


class BadDataError(CogpressError):
    """The examples cannot be trained on as they are; `report` tells what was found up to there."""

    def __init__(self, text: str, report: Report) -> None:
        super().__init__(text)
        self.report = report


class _BadExample(Exception):
    """A reason, for the line being read."""


class _EmptyAnswer(Exception):
    """The line being read holds an example with nothing to learn."""


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
    _check_task(prompt, data.task)
    report = Report(max_length=max_length)
    stops = _stops(tokenizer, stop_ids)
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
        except _BadExample as bad:
            problems.append(Problem(example.line, str(bad), path.name))
    report.lines += reading.lines
    report.empty_answers += reading.empty_answers
    report.problems += sorted(problems, key=lambda problem: problem.line)
    formats = Counter(report.formats)
    formats.update(example.format for example in reading.examples)
    report.formats = dict(formats.most_common())
    return pairs


def rows(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], stop_ids: Collection[int] = ()) -> list[Row]:
    """Examples that were read, tokenized as training does, uncut.

    Raises:
        CogpressError: one cannot be tokenized.
    """
    stops = _stops(tokenizer, stop_ids)
    try:
        return [tokenize(tokenizer, example, stops) for example in examples]
    except _BadExample as bad:
        raise CogpressError(f"An example cannot be tokenized: {bad}.") from None


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


# --- tokenizing -------------------------------------------------------------------------------------------------------


def tokenize(tokenizer: PreTrainedTokenizerBase, example: Example, stops: frozenset[int]) -> Row:
    """One example's row, of whatever length. Learnt are the answers with their end token; of `text`, all of it.

    Args:
        stops: the ids that end an answer when the model writes one, the tokenizer's end token among them.

    Raises:
        CogpressError: the template renders a conversation so far differently once it goes on, so that what would be
            trained is not what is served.
    """
    controls = sorted(chat.control_texts(tokenizer))
    for content in [example.text or ""] if example.messages is None else [turn.content for turn in example.messages]:
        for control in controls:
            if control in content:
                raise _BadExample(f"contains the control text {control}: give text without it, and chats as messages")
    if example.messages is None:
        ids = [*chat.encode_plain(tokenizer, example.text or ""), _end(tokenizer)]
        return Row(ids, ids.copy())
    if not tokenizer.chat_template:
        return _plain_row(tokenizer, example)
    return _chat_row(tokenizer, example, stops)


def _end(tokenizer: PreTrainedTokenizerBase) -> int:
    end: Any = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise CogpressError("The base model's tokenizer has no end-of-sequence token, so a model cannot learn to stop.")
    return end


def _stops(tokenizer: PreTrainedTokenizerBase, others: Collection[int]) -> frozenset[int]:
    return frozenset({_end(tokenizer), *others})


def _as_dicts(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [turn._asdict() for turn in turns]


def _plain_row(tokenizer: PreTrainedTokenizerBase, example: Example) -> Row:
    if example.format == "messages":
        raise CogpressError(
            "The base model's tokenizer has no chat template, so `messages` cannot be trained on. Use the "
            "instruction-tuned variant of the model, or give examples as `prompt` and `completion`."
        )
    asked = chat.encode_prompt(tokenizer, example.asked)
    whole = chat.encode_plain(tokenizer, chat.plain_prompt(example.asked) + example.answer)
    answer = whole[len(asked) :]
    if whole[: len(asked)] != asked:  # a token would span both, but a server is given the prompt alone
        answer = chat.encode_plain(tokenizer, example.answer, begin=False)
    answer = [*answer, _end(tokenizer)]
    return Row([*asked, *answer], [*[NO_LOSS] * len(asked), *answer])


def _chat_row(tokenizer: PreTrainedTokenizerBase, example: Example, stops: frozenset[int]) -> Row:
    assert example.messages is not None
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for index, turn in enumerate(example.messages):
        if turn.role != "assistant" or index < example.context:
            continue
        try:
            asked = chat.render(tokenizer, _as_dicts(example.messages[:index]), ask=True)
            answered = chat.render(tokenizer, _as_dicts(example.messages[: index + 1]), ask=False)
        except CogpressError as error:
            raise _BadExample(str(error).rstrip(".")) from None
        if not asked.startswith(done) or not answered.startswith(asked):
            raise _unfit_template(example)
        ids = _longer(tokenizer, ids, asked, asked[len(done) :], example)
        labels += [NO_LOSS] * (len(ids) - len(labels))
        whole = _longer(tokenizer, ids, answered, answered[len(asked) :], example)
        last = index == len(example.messages) - 1
        answer, rest = _answer_and_rest(tokenizer, whole[len(ids) :], stops, last)
        ids = [*ids, *answer, *rest]
        labels += [*answer, *[NO_LOSS] * len(rest)]
        done = answered
    return Row(ids, labels)


def _longer(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str, added: str, example: Example) -> list[int]:
    """Ids of `text` that begin with `ids`, those of `text` without `added` at its end.

    Tokenizing the whole is what serving does, and the rule. But where the whole would merge a token across the border
    (an answer that begins with a line break, after a template that ends in one), the model is asked with the border
    as it is, and so the two parts are tokenized apart.
    """
    whole = chat.encode_rendered(tokenizer, text)
    if whole[: len(ids)] == ids:
        return whole
    apart = [*ids, *chat.encode_rendered(tokenizer, added)]
    if _decode(tokenizer, apart) != _decode(tokenizer, whole):
        raise _unfit_template(example)
    return apart


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _unfit_template(example: Example) -> CogpressError:
    several = sum(turn.role == "assistant" for turn in example.messages or ()) > 1
    remedy = (
        "Give every answer its own example, with the turns before it as `prompt`"
        if several
        else "Correct the chat template beside the tokenizer, or choose another base"
    )
    return CogpressError(
        f"The base model's chat template writes a conversation differently once it goes on ({example.source} line "
        f"{example.line}), so what would be trained is not what the model is asked when it is served. {remedy}."
    )


def _answer_and_rest(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: frozenset[int], last: bool
) -> tuple[list[int], list[int]]:
    """What of an assistant's turn is learnt, and what the template puts behind it.

    An answer is learnt up to the first token on which generation stops. Without one, the last answer is given the
    tokenizer's end token, after the template's own end-of-turn token if it has one.
    """
    for position, token in enumerate(ids):
        if token in stops:
            return list(ids[: position + 1]), list(ids[position + 1 :])
    end = len(ids)
    while end and not chat.is_control(tokenizer, ids[end - 1]) and not _decode(tokenizer, [ids[end - 1]]).strip():
        end -= 1
    if last:
        return [*ids[:end], _end(tokenizer)], []
    return list(ids[:end]), list(ids[end:])


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path, *, prompt: config.Prompt | None = None, task: str = "answer") -> Reading:
    """Read and check a file of examples; bad lines are collected, not raised.

    The format is told per line by its keys, a null counting as no key: `messages`; `prompt` and `completion`, both
    text or messages; Alpaca's `instruction`, `input` and `output`; `text`. The first that fits is taken. The prompt
    template is filled by a `prompt` that is an object, and where it has one field by a `prompt` or `instruction` that
    is text; where it has several, a text is taken as the template already filled.

    Raises:
        CogpressError: the file cannot be read, is of no known kind, or holds no line at all.
    """
    prompt = prompt or config.Prompt()
    _check_task(prompt, task)
    reading = Reading(examples=[], problems=[], lines=0, empty_answers=0)
    lines = empty = 0
    for number, item in _items(path):
        lines += 1
        try:
            if isinstance(item, _BadExample):
                raise item
            reading.examples.append(_example(item, number, path.name, prompt, task))
        except _EmptyAnswer:
            empty += 1
        except _BadExample as bad:
            reading.problems.append(Problem(number, str(bad), path.name))
    if not lines:
        raise CogpressError(f"{path} holds no examples. Give one JSON object per line, or one Parquet row each.")
    return Reading(reading.examples, reading.problems, lines, empty)


def _check_task(prompt: config.Prompt, task: str) -> None:
    if task == "reversed" and len(prompt.fields) != 1:
        raise CogpressError(
            f"Learning reversed asks with one text, and prompt.template has the fields {', '.join(prompt.fields)}. "
            "Give it a template with one."
        )


_Item = tuple[int, Any]
"""A line's number, and what it held or, as a `_BadExample`, why it could not be parsed."""


def _items(path: Path) -> Iterator[_Item]:
    suffix = path.suffix.lower()
    suffix = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
    if not path.exists():
        raise CogpressError(f"{path} does not exist. Name a JSONL or Parquet file of examples.")
    if not path.is_file():
        raise CogpressError(f"{path} is not a file. Name a JSONL or Parquet file of examples.")
    # Cog names a downloaded file without a suffix; its first bytes tell what it is.
    suffix = suffix or ".json"
    if suffix not in (*_JSON_SUFFIXES, ".parquet"):
        raise CogpressError(
            f"{path} is not named as a kind of file that is known. Give examples as .jsonl, .json or .parquet "
            "(.jsonl.gz and .json.gz will do)."
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == b"PAR1" or suffix == ".parquet":
                yield from _parquet(file, path)
            elif start[:2] == b"\x1f\x8b":
                with gzip.open(file) as unpacked:
                    yield from _json(unpacked, path, suffix)
            else:
                yield from _json(file, path, suffix)
    except (OSError, EOFError, zlib.error) as error:  # gzip's errors are among these
        raise CogpressError(f"{path} cannot be read: {_one_line(error)}. Check the file.") from None


def _parquet(file: IO[bytes], path: Path) -> Iterator[_Item]:
    import pyarrow.parquet  # a second to import, and most examples are JSON

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in parquet.schema_arrow.names if name in _KEYS]
        if not columns:
            raise CogpressError(
                f"{path} has none of the columns {', '.join(_KEYS)}; {_keys(parquet.schema_arrow.names)}."
            )
        number = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield number, batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:  # Parquet does not check that its text is UTF-8
                    yield number, _BadExample("not UTF-8")
    except pyarrow.ArrowException as error:
        raise CogpressError(f"{path} is not readable as Parquet: {_one_line(error)}. Write it again.") from None


def _json(file: IO[bytes] | gzip.GzipFile, path: Path, suffix: str) -> Iterator[_Item]:
    start = file.peek(64)[:64] if isinstance(file, gzip.GzipFile) else _peek(file)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise CogpressError(f"{path} is UTF-16. Save it as UTF-8.")
    if suffix == ".json" and start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _json_list(file.read(), path)
    else:
        yield from _json_lines(file)


def _peek(file: IO[bytes]) -> bytes:
    start = file.read(64)
    file.seek(0)
    return start


def _json_list(content: bytes, path: Path) -> Iterator[_Item]:
    try:
        items = _parse(content.removeprefix(b"\xef\xbb\xbf"))
    except _BadExample as bad:
        raise CogpressError(f"{path} begins as a JSON list and is {bad}. Correct it, or give JSONL.") from None
    yield from enumerate(items, start=1)


def _json_lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[_Item]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, _BadExample(f"longer than {MAX_LINE_BYTES // 2**20} MiB")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, _parse(line)
        except _BadExample as bad:
            yield number, bad


def _parse(content: bytes) -> Any:
    if b"\0" in content:
        raise _BadExample("not JSON: it contains a NUL byte")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadExample(f"not UTF-8 at byte {error.start + 1}") from None
    except RecursionError:
        raise _BadExample("not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise _BadExample(f"not JSON: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]


# --- the four formats -------------------------------------------------------------------------------------------------


def _example(item: Any, line: int, source: str, prompt: config.Prompt, task: str) -> Example:
    if not isinstance(item, dict):
        raise _BadExample(f"{_kind(item)} and not a JSON object")
    has = {name: value for name, value in item.items() if value is not None}
    if "messages" in has:
        return _chat_example(_turns(has["messages"], "messages"), 0, "messages", line, source, prompt, task)
    if "prompt" in has and "completion" in has:
        asked = _asked_turns(has["prompt"], prompt, task)
        answered = _answer_turns(has["completion"])
        return _chat_example((*asked, *answered), len(asked), "prompt/completion", line, source, prompt, task)
    if "instruction" in has and "output" in has:
        parts = [_text(has["instruction"], "instruction"), _text(has.get("input", ""), "input")]
        if not parts[0].strip():
            raise _BadExample("instruction is empty")
        asked = (Turn("user", _fill(prompt, "\n\n".join(part for part in parts if part.strip()), task)),)
        answered = (Turn("assistant", _text(has["output"], "output")),)
        return _chat_example((*asked, *answered), 1, "alpaca", line, source, prompt, task)
    if "text" in has:
        text = _text(has["text"], "text")
        if task == "reversed":
            raise _BadExample("text has no prompt, so it cannot be learnt reversed")
        if not text.strip():
            raise _EmptyAnswer
        return Example(None, text, line, source, "text")
    raise _BadExample(
        "unknown format: neither messages, nor prompt and completion, nor instruction and output, nor text; "
        + _keys(list(has))
    )


def _chat_example(
    turns: Sequence[Turn], context: int, format: Format, line: int, source: str, prompt: config.Prompt, task: str
) -> Example:
    _check_order(turns)
    if not all(turn.content.strip() for turn in turns if turn.role == "user"):
        raise _BadExample("the prompt is empty")
    if not all(turn.content.strip() for turn in turns[context:] if turn.role == "assistant"):
        raise _EmptyAnswer
    if task == "reversed":
        turns, context = _reversed(turns, prompt), 0
    if prompt.system and turns[0].role != "system":
        turns, context = (Turn("system", prompt.system), *turns), context + 1
    return Example(tuple(turns), None, line, source, format, context)


def _reversed(turns: Sequence[Turn], prompt: config.Prompt) -> tuple[Turn, ...]:
    *system, asked, answered = turns
    if [turn.role for turn in system] not in ([], ["system"]):
        raise _BadExample("a conversation of several turns cannot be learnt reversed")
    return (
        *system,
        Turn("user", prompt.fill(answered.content)),
        Turn("assistant", asked.content),
    )


def _check_order(turns: Sequence[Turn]) -> None:
    before = ""
    for number, turn in enumerate(turns, start=1):
        if turn.role not in _MAY_FOLLOW[before]:
            after = f"after {before}" if before else "first"
            raise _BadExample(f"message {number} is {turn.role}, but {after} comes {' or '.join(_MAY_FOLLOW[before])}")
        before = turn.role
    if before != "assistant":
        raise _BadExample(f"ends with {before or 'nothing'}, but the last message must be assistant's, to be learnt")


def _turns(value: Any, name: str) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise _BadExample(f"{name} is {_kind(value)} and not a list")
    if not value:
        raise _BadExample(f"{name} is empty")
    return tuple(_turn(item, f"{name}[{index}]") for index, item in enumerate(value))


def _turn(value: Any, name: str) -> Turn:
    if not isinstance(value, dict):
        raise _BadExample(f"{name} is {_kind(value)} and not an object")
    role = value.get("role")
    if not isinstance(role, str) or not role or role not in _MAY_FOLLOW:
        raise _BadExample(f"{name} has the role {_short(role)}, not system, user, assistant or tool")
    return Turn(role, _text(value.get("content"), f"{name}.content"))


def _asked_turns(value: Any, prompt: config.Prompt, task: str) -> tuple[Turn, ...]:
    if isinstance(value, list):
        return _turns(value, "prompt")
    if isinstance(value, dict):
        if task == "reversed":
            raise _BadExample("prompt is an object of fields, so it cannot be learnt reversed")
        try:
            return (Turn("user", _text(prompt.render(value), "prompt")),)
        except CogpressError as error:
            raise _BadExample(str(error).rstrip(".")) from None
    return (Turn("user", _fill(prompt, _text(value, "prompt"), task)),)


def _answer_turns(value: Any) -> tuple[Turn, ...]:
    return _turns(value, "completion") if isinstance(value, list) else (Turn("assistant", _text(value, "completion")),)


def _fill(prompt: config.Prompt, text: str, task: str) -> str:
    """The text as the server would ask it. Learnt reversed it is the answer, which no template wraps."""
    return text if not text.strip() or task == "reversed" else prompt.fill(text)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadExample(f"{name} is {_kind(value)} and not a string")
    if "\0" in value:
        raise _BadExample(f"{name} contains a NUL character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _BadExample(f"{name} contains half of a surrogate pair, which is no character") from None
    return value


def _kind(value: Any) -> str:
    """What a value is, for a reason, with its article."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def _keys(names: Sequence[str]) -> str:
    """The keys, told apart from what they might do to a terminal."""
    shown = ", ".join(_short(name) for name in names[:8])
    return f"it has {shown}{', ...' if len(names) > 8 else ''}" if names else "it has no keys with a value"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
