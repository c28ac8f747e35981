"""A file of examples as rows: JSON lines, a JSON list, JSON objects over several lines or Parquet, gzipped or not."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cogpress.errors import CogpressError
from cogpress.given import too_deep

MAX_LINE_BYTES = 16 * 1024 * 1024

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_BATCH = 1024  # rows held at once
_SPACE = re.compile(r"\s*")
_TOO_DEEP = "not readable JSON: it is nested too deeply"


class BadRow(Exception):
    """Why a row cannot be used, for a person."""


Rows = Iterator[tuple[int, Any]]
"""A row's number, from 1, and its value as JSON types, or as a `BadRow` why it cannot be parsed."""


class _TwiceError(BadRow):
    """A key stands twice in one object, so that one of its values would be lost."""


class _Twice(dict[str, Any]):
    """An object with a key that stands twice; `key` is it."""

    key: str


def rows(path: Path, columns: Sequence[str], ignore: Collection[str] = ()) -> Rows:
    """The rows of a file: lines of JSONL that are not blank, items of a JSON list, JSON objects, rows of Parquet.

    Args:
        path: the file.
        columns: of Parquet, those of which at least one is needed; a JSON object with none of them may hold the list.
        ignore: of Parquet, those not to read.

    Raises:
        CogpressError: the file cannot be read, or is of no known kind.
    """
    suffix = path.suffix.lower()
    suffix = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
    if not path.exists():
        raise CogpressError(f"{path} does not exist. Name a JSONL or Parquet file of examples.")
    if not path.is_file():
        raise CogpressError(f"{path} is not a file. Name a JSONL or Parquet file of examples.")
    # Cog downloads to a file without a suffix; the first bytes tell its kind.
    suffix = suffix or ".json"
    if suffix not in (*_JSON_SUFFIXES, ".parquet"):
        of_table = ": pandas.read_csv(PATH).to_json(PATH, orient='records', lines=True) writes one of a table"
        raise CogpressError(
            f"{path} has an unknown suffix. Give examples as .jsonl, .json or .parquet (or .jsonl.gz, .json.gz)"
            f"{of_table if suffix in ('.csv', '.tsv') else ''}."
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == b"PAR1" or suffix == ".parquet":
                yield from _parquet(file, path, columns, ignore)
            elif start[:2] == b"\x1f\x8b":
                with gzip.open(file) as unpacked:
                    yield from _json(unpacked, path, suffix, columns)
            else:
                yield from _json(file, path, suffix, columns)
    except (OSError, EOFError, zlib.error) as error:  # gzip's errors included
        raise CogpressError(f"{path} cannot be read: {_one_line(error)}. Check the file.") from None


def _parquet(file: IO[bytes], path: Path, columns: Sequence[str], ignore: Collection[str]) -> Rows:
    import pyarrow.parquet  # a second to import, and most examples are JSON

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        present = [name for name in parquet.schema_arrow.names if name not in ignore]
        if not set(present) & set(columns):
            raise CogpressError(
                f"{path} has none of the columns {', '.join(columns)}; {found_keys(parquet.schema_arrow.names)}."
            )
        number = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH, columns=present):
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield number, _present(batch.slice(index, 1).to_pylist()[0])
                except UnicodeDecodeError:  # Parquet does not check that its text is UTF-8
                    yield number, BadRow("not UTF-8")
                except (ValueError, OverflowError, RecursionError, KeyError) as error:  # such as the year 300000
                    yield number, BadRow(f"not readable: {_one_line(error)}")
    except pyarrow.ArrowException as error:
        raise CogpressError(f"{path} is not readable as Parquet: {_one_line(error)}. Write it again.") from None


def _present(value: Any) -> Any:
    """A value without nulls: a column's objects all have the keys of each, with null for those that they lack."""
    if isinstance(value, dict):
        return {name: _present(one) for name, one in value.items() if one is not None}
    return [_present(one) for one in value] if isinstance(value, list) else value


def _json(file: IO[bytes] | gzip.GzipFile, path: Path, suffix: str, columns: Sequence[str]) -> Rows:
    start = file.peek(64)[:64] if isinstance(file, gzip.GzipFile) else _peek(file)
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise CogpressError(f"{path} is UTF-16. Save it as UTF-8.")
    if suffix == ".json" and start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        yield from _json_list(file.read(), path)
    elif (items := _over_several_lines(file, path, suffix, columns)) is not None:
        yield from items
    else:
        yield from _json_lines(file)


def _peek(file: IO[bytes]) -> bytes:
    start = file.read(64)
    file.seek(0)
    return start


def _json_list(content: bytes, path: Path) -> Rows:
    content = content.removeprefix(b"\xef\xbb\xbf")
    try:
        items = _parse(content)
    except _TwiceError:
        items = _items(content, path)
    except BadRow as bad:
        raise CogpressError(f"{path} begins like a JSON list but is {bad}. Correct it, or give JSONL.") from None
    yield from enumerate(items, start=1)


def _items(content: bytes, path: Path) -> list[Any]:
    """A JSON list of which an object has a key twice."""
    try:
        return [_single(item) for item in json.loads(content.decode("utf-8"), object_pairs_hook=_marked)]
    except (ValueError, RecursionError) as error:
        raise CogpressError(
            f"{path} begins like a JSON list but is not JSON: {_one_line(error)}. Correct it."
        ) from None


def _over_several_lines(
    file: IO[bytes] | gzip.GzipFile, path: Path, suffix: str, columns: Sequence[str]
) -> Rows | None:
    """The rows of JSON objects that go over several lines; None, and the file at its start, where lines are rows.

    One object whose only key is no row's, such as `data`, may hold the list of rows.
    """
    first = b""
    while not first.strip() and (line := file.readline(MAX_LINE_BYTES + 1)):
        first = line.removeprefix(b"\xef\xbb\xbf")
    file.seek(0)
    opens = first.strip() in (b"{", b"[")
    if not opens and (suffix != ".json" or first.lstrip()[:1] != b"{" or _is_whole(first)):
        whole = suffix == ".json" and _is_whole(first)
        if whole and (wrapped := _wrapped(json.loads(first), columns)) is not None:
            if not file.read()[len(first) :].strip():
                return iter(enumerate(wrapped, start=1))
            file.seek(0)
        return None
    try:
        text = file.read().decode("utf-8-sig")
        items: list[Any] = []
        decoder = json.JSONDecoder(object_pairs_hook=_marked)
        at = _after_space(text, 0)
        while at < len(text):
            item, at = decoder.raw_decode(text, at)
            items.append(item)
            at = _after_space(text, at)
    except (ValueError, RecursionError) as error:
        if opens:
            raise CogpressError(
                f"{path} holds JSON over several lines, which cannot be read: {_one_line(error)}. Correct it there, or "
                "give one JSON object per line."
            ) from None
        file.seek(0)
        return None
    if len(items) == 1:
        items = items[0] if isinstance(items[0], list) else _wrapped(items[0], columns) or items
    return iter(enumerate(map(_single, items), start=1))


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def _is_whole(line: bytes) -> bool:
    try:
        json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return False
    return True


def _wrapped(item: Any, columns: Sequence[str]) -> list[Any] | None:
    if isinstance(item, dict) and len(item) == 1:
        [(name, value)] = item.items()
        if name not in columns and isinstance(value, list):
            return value
    return None


def _marked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) == len(pairs):
        return made
    twice = _Twice(made)
    names = [name for name, _ in pairs]
    twice.key = next(name for name in names if names.count(name) > 1)
    return twice


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = _marked(pairs)
    if isinstance(made, _Twice):
        raise _said_twice(made)
    return made


def _said_twice(twice: _Twice) -> _TwiceError:
    return _TwiceError(f"the key {short(twice.key)} stands twice in one object, so one of its values would be lost")


def _single(item: Any) -> Any:
    """The item, or why it cannot be used where a key in it stands twice, or it is nested too deeply."""
    if too_deep(item):
        return BadRow(_TOO_DEEP)
    found = _first_twice(item)
    return item if found is None else _said_twice(found)


def _first_twice(value: Any) -> _Twice | None:
    if isinstance(value, _Twice):
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for one in inner if (found := _first_twice(one)) is not None), None)


def _json_lines(file: IO[bytes] | gzip.GzipFile) -> Rows:
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, BadRow(f"longer than {MAX_LINE_BYTES // 2**20} MiB")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            yield number, _parse(line)
        except BadRow as bad:
            yield number, bad


def _parse(content: bytes) -> Any:
    if b"\0" in content:
        raise BadRow("not JSON: it contains a NUL byte")
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_unrepeated)
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start + 1}") from None
    except RecursionError:
        raise BadRow(_TOO_DEEP) from None
    except ValueError as error:
        raise BadRow(f"not JSON: {_one_line(error)}") from None
    if too_deep(found):
        raise BadRow(_TOO_DEEP)
    return found


def parse_text(text: str, name: str) -> Any:
    """JSON that a row holds as text.

    Raises:
        BadRow: it is not JSON, or a key stands twice in it; names it.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unrepeated)
        if too_deep(found):
            raise ValueError("it is nested too deeply")
        return found
    except _TwiceError as twice:
        raise BadRow(f"{name}: {twice}") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{name} is not JSON: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]


def found_keys(names: Sequence[str]) -> str:
    """The keys of a row in words, escaped and shortened for a terminal."""
    shown = ", ".join(short(name) for name in names[:8])
    return f"it has {shown}{', ...' if len(names) > 8 else ''}" if names else "it has no keys with a value"


def short(value: Any) -> str:
    """A value's representation in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
