"""A file of examples as rows: JSON lines, a JSON list or Parquet, gzipped or not."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from cogpress.errors import CogpressError

MAX_LINE_BYTES = 16 * 1024 * 1024

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_BATCH = 1024  # rows held at once


class BadRow(Exception):
    """Why a row cannot be used, for a person."""


Rows = Iterator[tuple[int, Any]]
"""A row's number, from 1, and its value as JSON types, or as a `BadRow` why it cannot be parsed."""


def rows(path: Path, columns: Sequence[str]) -> Rows:
    """The rows of a file: lines of JSONL that are not blank, items of a JSON list, rows of Parquet.

    Args:
        path: the file.
        columns: of Parquet, those to read.

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
        raise CogpressError(
            f"{path} has an unknown suffix. Give examples as .jsonl, .json or .parquet (or .jsonl.gz, .json.gz)."
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            if start == b"PAR1" or suffix == ".parquet":
                yield from _parquet(file, path, columns)
            elif start[:2] == b"\x1f\x8b":
                with gzip.open(file) as unpacked:
                    yield from _json(unpacked, path, suffix)
            else:
                yield from _json(file, path, suffix)
    except (OSError, EOFError, zlib.error) as error:  # gzip's errors included
        raise CogpressError(f"{path} cannot be read: {_one_line(error)}. Check the file.") from None


def _parquet(file: IO[bytes], path: Path, columns: Sequence[str]) -> Rows:
    import pyarrow.parquet  # a second to import, and most examples are JSON

    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        present = [name for name in parquet.schema_arrow.names if name in columns]
        if not present:
            raise CogpressError(
                f"{path} has none of the columns {', '.join(columns)}; {found_keys(parquet.schema_arrow.names)}."
            )
        number = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH, columns=present):
            for index in range(batch.num_rows):
                number += 1
                try:
                    yield number, batch.slice(index, 1).to_pylist()[0]
                except UnicodeDecodeError:  # Parquet does not check that its text is UTF-8
                    yield number, BadRow("not UTF-8")
    except pyarrow.ArrowException as error:
        raise CogpressError(f"{path} is not readable as Parquet: {_one_line(error)}. Write it again.") from None


def _json(file: IO[bytes] | gzip.GzipFile, path: Path, suffix: str) -> Rows:
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


def _json_list(content: bytes, path: Path) -> Rows:
    try:
        items = _parse(content.removeprefix(b"\xef\xbb\xbf"))
    except BadRow as bad:
        raise CogpressError(f"{path} begins like a JSON list but is {bad}. Correct it, or give JSONL.") from None
    yield from enumerate(items, start=1)


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
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 at byte {error.start + 1}") from None
    except RecursionError:
        raise BadRow("not readable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise BadRow(f"not JSON: {_one_line(error)}") from None


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
