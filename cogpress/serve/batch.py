"""Batch inference: a file of predictions answered at full throughput, each line once, resumable at any point."""

# Finished lines go to a journal beside the result, in the order in which the engine finishes them. An interrupted run
# resumes from it and drops a half-written last line. Once all lines are there, the result is written in order and
# renamed into place, and the journal is removed.

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from cogpress import source
from cogpress.config import Config
from cogpress.engines.base import DEAD
from cogpress.errors import CogpressError
from cogpress.given import kind, parse
from cogpress.weights import fetch, manifest
from cogpress.weights.fetch import FetchedModel

CARRIED = ("id", "custom_id", "completion")
"""Fields that a line may have beside inputs; they are copied to its result."""

JSON_INPUTS = ("fields", "messages", "tools", "json_schema", "choices", "logit_bias", "stop")
"""Inputs that a line may give as JSON values instead of as text that holds JSON."""

WAITING_SHARE = 0.5
"""Lines queued in the engine, as a share of those that it runs at once. When one ends, the next starts in the same
step, instead of leaving its slot empty until this process responds."""

FLUSH_SECONDS = 1.0
"""Longest time before a finished line is on disk."""


INDIFFERENT = {"weights", "form", "metrics_port", "log", "cpu_threads", "gpu_memory_share", "cpu_kv_cache_gb"}
"""Serving options that change no answer; `weights` is compared by its files."""


class Answering(Protocol):
    """What answers a line: `serve.model.ServedModel`."""

    async def answer(
        self, given: Mapping[str, Any], record: Callable[[str, Any], None], *, stream: bool = True
    ) -> AsyncIterator[str]:
        """See `ServedModel.answer`."""


@dataclass(frozen=True)
class Totals:
    """The result of a run. `tokens` and `seconds` are this run's own, without what it resumed."""

    lines: int
    reused: int
    failed: int
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """This run's throughput."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


def count(path: Path) -> int:
    """The number of lines of a file that are not blank.

    Raises:
        CogpressError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise CogpressError(f"{path} cannot be read: {error.strerror}. Name a file of JSON lines.") from None


def run(
    source: Path,
    target: Path,
    server: Callable[[], Answering],
    fields: Mapping[str, Mapping[str, Any]],
    *,
    concurrency: int,
    made_by: Mapping[str, Any],
    fresh: bool = False,
    progress: Callable[[int, int, int], None] = lambda _done, _failed, _tokens: None,
) -> Totals:
    """Answer every line of a file.

    Args:
        source: JSON lines, each an object of a prediction's inputs.
        target: JSON lines: for each line of `source`, in order, `line` (from 1) with `output` and `metrics`, or with
            `error`.
        server: makes the model; called only if there is something to answer.
        fields: the inputs, as `schema.inputs` describes them.
        concurrency: number of lines that the engine runs at once.
        made_by: everything but the lines that determines the answers; a journal made by anything else is replaced.
        fresh: replace any journal.
        progress: called when a line finishes, with the number finished, the number failed, and tokens so far.

    Raises:
        CogpressError: the file cannot be read, or the engine died; finished lines stay in the journal.
    """
    started = time.perf_counter()
    total = count(source)
    if target.exists() and target.samefile(source):
        raise CogpressError(f"{target} is the input itself. Name another file for the result.")
    with BatchJournal(target, _key(made_by), {at: _hash(line) for at, line in _lines(source)}, fresh) as journal:
        reused = len(journal.done)
        tokens = 0

        def finished(line: int, result: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += int(result.get("metrics", {}).get("output_token_count", 0))
            journal.add(line, result)
            progress(len(journal.done), journal.failed, tokens)

        progress(reused, journal.failed, 0)
        if reused < total:
            made = server()
            started = time.perf_counter()
            todo = ((at, line) for at, line in _lines(source) if at not in journal.done)
            asyncio.run(_answer_all(made, todo, fields, concurrency, finished))
        seconds = time.perf_counter() - started
        journal.finish([at for at, _ in _lines(source)])
        return Totals(total, reused, journal.failed, tokens, seconds)


def made_by(wanted: str | None, settings: Config, root: Path) -> dict[str, Any]:
    """Everything but the lines that determines the answers: weights, adapters, prompt and options.

    Fetches them; loading them afterwards finds them in the cache.

    Args:
        wanted: the source of the weights; None for the base that the adapters share.
        settings: the project's configuration.
        root: the project's folder.

    Raises:
        CogpressError: as `fetch.model` and `fetch.adapter`.
    """
    cache = root / ".cache"
    adapters = {name: fetch.adapter(source.under(place, root), cache) for name, place in settings.adapters.items()}
    return {
        "weights": None if wanted is None else _identity(fetch.model(wanted, cache)),
        "adapters": {name: _identity(found) for name, found in adapters.items()},
        "base": settings.base.model_dump() if settings.adapters else None,
        "prompt": settings.prompt.model_dump(),
        "serve": settings.serve.model_dump(exclude=INDIFFERENT),
    }


def _identity(found: FetchedModel) -> dict[str, Any]:
    """A checked folder's files by their hashes, and the prompt that it brings."""
    facts = found.manifest or {"files": manifest.hashes(found.folder)}
    return {"files": facts["files"], "prompt": facts.get("prompt")}


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for at, line in enumerate(file, 1):
            if line.strip():
                yield at, line


def _key(made_by: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(made_by), sort_keys=True, default=str).encode()).hexdigest()


def _hash(line: bytes) -> str:
    return hashlib.sha256(line.strip()).hexdigest()


async def _answer_all(
    server: Answering,
    lines: Iterator[tuple[int, bytes]],
    fields: Mapping[str, Mapping[str, Any]],
    concurrency: int,
    finished: Callable[[int, dict[str, Any]], None],
) -> None:
    """Keep enough requests in flight that the engine always runs as many as it can."""

    async def work() -> None:
        for at, line in lines:
            finished(at, await _answer(server, at, line, fields))

    workers = [asyncio.create_task(work()) for _ in range(concurrency + math.ceil(WAITING_SHARE * concurrency))]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _answer(server: Answering, at: int, line: bytes, fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    carried: dict[str, Any] = {}
    try:
        row = read(line)
        carried = {name: row.pop(name) for name in CARRIED if name in row}
        metrics: dict[str, Any] = {}
        chunks = await server.answer(inputs(row, fields), metrics.__setitem__, stream=False)
        output = "".join([chunk async for chunk in chunks])
    except CogpressError as error:
        if str(error) == DEAD or getattr(getattr(server, "engine", None), "dead", False):
            raise _stopped(at) from None
        return {"line": at, **carried, "error": str(error)}
    except Exception:  # noqa: BLE001 - one line must not end the run for the others
        if getattr(getattr(server, "engine", None), "dead", False):
            raise _stopped(at) from None
        traceback.print_exc()
        return {"line": at, **carried, "error": "The model failed at this line unexpectedly. The log has the cause."}
    return {"line": at, **carried, "output": output, "metrics": metrics}


def _stopped(at: int) -> CogpressError:
    return CogpressError(
        f"The engine stopped at line {at}. Finished lines are kept; run the same command again to resume."
    )


def read(line: bytes) -> dict[str, Any]:
    """The JSON object of a line.

    Raises:
        CogpressError: it is not a JSON object.
    """
    try:
        row = parse(line.decode(json.detect_encoding(line), "surrogatepass"))
    except ValueError as error:
        raise CogpressError(f"The line is not JSON: {error}.") from None
    if not isinstance(row, dict):
        raise CogpressError('The line must be a JSON object, such as {"prompt": "..."}.')
    return row


def inputs(row: Mapping[str, Any], fields: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A prediction's inputs from a line, checked as Cog checks them. An object as `prompt` fills the template's fields.

    Raises:
        CogpressError: an input does not exist, or its value has the wrong type or is out of bounds.
    """
    given = dict(row)
    if isinstance(given.get("prompt"), dict):
        given["fields"] = given.pop("prompt")
    for name in JSON_INPUTS:
        if isinstance(given.get(name), dict | list):
            given[name] = json.dumps(given[name], ensure_ascii=False)
    for name, value in given.items():
        if name not in fields:
            raise CogpressError(f"There is no input {name[:80]!r}. The inputs are {', '.join(fields)}.")
        _check(name, value, fields[name])
    return given


_TYPES = {"string": str, "integer": int, "number": int | float, "boolean": bool}


def _check(name: str, value: Any, field: Mapping[str, Any]) -> None:
    if value is None and field.get("nullable"):
        return
    type_ = str(field.get("type", "string"))
    whole = isinstance(value, float) and value.is_integer()
    wrong = not isinstance(value, _TYPES.get(type_, object)) or (type_ != "boolean" and isinstance(value, bool))
    wrong = wrong and not (type_ == "integer" and whole)
    if wrong:
        found = value if isinstance(value, float) else kind(value)
        raise CogpressError(f"{name} must be of type {type_}, not {found}.")
    if type_ in ("integer", "number") and not (field.get("minimum", value) <= value <= field.get("maximum", value)):
        bounds = f"from {field.get('minimum', 'any')} to {field.get('maximum', 'any')}"
        raise CogpressError(f"{name} is {value}; it must be {bounds}.")


class BatchJournal:
    """Finished lines of an unfinished run, on disk beside its result."""

    def __init__(self, target: Path, key: str, hashes: Mapping[int, str], fresh: bool) -> None:
        """Nothing is read or written before the block begins.

        Args:
            target: the result.
            key: identifies what made the lines; a journal with another key is replaced.
            hashes: of each line of the input, by its number; a finished line counts for one of the same hash.
            fresh: replace it in any case.

        Raises:
            CogpressError: on entry, if another run writes the same result.
        """
        self.path = target.with_name(f"{target.name}.journal")
        self.target = target
        self.done: dict[int, int] = {}
        """The byte offset in the journal of each finished line's result."""
        self.failed = 0
        self._key, self._hashes = key, hashes
        self._open: dict[str, list[int]] = {}
        """The lines of each hash that have no result yet."""
        for line, found in hashes.items():
            self._open.setdefault(found, []).append(line)
        self._strange = 0
        self._file: IO[bytes]
        self._fresh = fresh
        self._flushed = time.monotonic()

    def __enter__(self) -> BatchJournal:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._locked()
        end, size = (0, 0) if self._fresh else (self._read(), self.path.stat().st_size)
        if size and not end:
            self._set_aside("The journal was made with other weights or options")
        elif self._strange:
            self._set_aside(f"{self._strange} finished lines of the journal are not in the input any more")
        self._file.truncate(end)
        self._file.seek(end)
        if not end:
            self._file.write(json.dumps({"key": self._key}).encode() + b"\n")
        return self

    def _set_aside(self, why: str) -> None:
        names = (self.path.with_name(f"{self.path.name}.old{number or ''}") for number in itertools.count())
        old = next(path for path in names if not path.exists())
        shutil.copyfile(self.path, old)
        print(f"{why}; it is set aside as {old}.", file=sys.stderr)

    def _locked(self) -> IO[bytes]:
        while True:
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise CogpressError(f"Another run writes {self.target}. Wait for it, or name another file.") from None
            # A run that ended between the two calls has removed the file that is locked now.
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                return file
            file.close()

    def _read(self) -> int:
        """Read an existing journal; returns the offset where its last whole line ends, 0 if it is of no use."""
        end = 0
        try:
            with self.path.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    content = json.loads(line)
                    if end == 0 and content.get("key") != self._key:
                        return 0
                    if end:
                        self._take(content, end)
                    end += len(line)
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # the machine stopped while it wrote this line; those before it are whole
        return end

    def _take(self, result: dict[str, Any], at: int) -> None:
        """Assign a journal's result to the line that it answers, wherever that is in the input now."""
        where = self._open.get(result["of"], [])
        if not where:
            self._strange += 1
            return
        line = int(result["line"])
        line = line if line in where else where[0]
        where.remove(line)
        self._count(line, result, at)

    def _count(self, line: int, result: dict[str, Any], at: int) -> None:
        self.done[line] = at
        self.failed += "error" in result

    def add(self, line: int, result: dict[str, Any]) -> None:
        """Add a finished line."""
        self._count(line, result, self._file.tell())
        result = {**result, "of": self._hashes[line]}
        self._file.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._flushed = time.monotonic()

    def finish(self, lines: list[int]) -> None:
        """Write the result in order and remove the journal."""
        self._flush()
        part = self.target.with_name(f"{self.target.name}.part")
        with part.open("wb") as out:
            for line in lines:
                self._file.seek(self.done[line])
                result = json.loads(self._file.readline())
                del result["of"]
                result["line"] = line
                out.write(json.dumps(result, ensure_ascii=False).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, self.target)
        self.path.unlink()
        self._file.close()

    def __exit__(self, *_error: object) -> None:
        if not self._file.closed:
            self._flush()
            self._file.close()
