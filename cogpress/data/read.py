"""A file of examples, read and checked line by line: JSON lines, a JSON list or Parquet, gzipped or not.

Knows files and what is no line of theirs; what a line means is `cogpress.data.example`'s.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cogpress import config
from cogpress.data.example import KEYS, BadExample, EmptyAnswer, Example, check_task, example_of, found_keys
from cogpress.errors import CogpressError

MAX_LINE_BYTES = 16 * 1024 * 1024

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_BATCH = 1024  # rows held at once


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
    check_task(prompt, task)
    reading = Reading(examples=[], problems=[], lines=0, empty_answers=0)
    lines = empty = 0
    for number, item in _items(path):
        lines += 1
        try:
            if isinstance(item, BadExample):
                raise item
            reading.examples.append(example_of(item, number, path.name, prompt, task))
        except EmptyAnswer:
            empty += 1
        except BadExample as bad:
            reading.problems.append(Problem(number, str(bad), path.name))
    if not lines:
        raise CogpressError(f"{path} holds no examples. Give one JSON object per line, or one Parquet row each.")
    return Reading(reading.examples, reading.problems, lines, empty)


_Item = tuple[int, Any]
"""A line's number, and what it held or, as a `BadExample`, why it could not be parsed."""


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
        columns = [name for name in parquet.schema_arrow.names if name in KEYS]
        if not columns:
            raise CogpressError(
                f"{path} has none of the columns {', '.join(KEYS)}; {found_keys(parquet.schema_arrow.names)}."
            )
        number = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH, columns=columns):
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield number, batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:  # Parquet does not check that its text is UTF-8
                    yield number, BadExample("not UTF-8")
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
    except BadExample as bad:
        raise CogpressError(f"{path} begins as a JSON list and is {bad}. Correct it, or give JSONL.") from None
    yield from enumerate(items, start=1)


def _json_lines(file: IO[bytes] | gzip.GzipFile) -> Iterator[_Item]:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, BadExample(f"longer than {MAX_LINE_BYTES // 2**20} MiB")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, _parse(line)
        except BadExample as bad:
            yield number, bad


def _parse(content: bytes) -> Any:
    if b"\0" in content:
        raise BadExample("not JSON: it contains a NUL byte")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadExample(f"not UTF-8 at byte {error.start + 1}") from None
    except RecursionError:
        raise BadExample("not JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise BadExample(f"not JSON: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
