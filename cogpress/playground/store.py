"""Persist everything in one SQLite file, written in batches by one thread; enforce retention and `keep_prompts`."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cogpress.errors import CogpressError

CRASHED = "The playground ended while this was waiting or running. Run it again."
"""The error of whatever had not ended when the store was opened."""

RETRY_SECONDS = 1.0
"""Between attempts to write after a failure."""

SEARCHED = 100_000
"""Characters of a text that are indexed for search; the rest is stored too."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS predictions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created REAL NOT NULL, started REAL, completed REAL,
    status TEXT NOT NULL, model TEXT NOT NULL, version TEXT NOT NULL, source TEXT NOT NULL,
    input TEXT, output TEXT, logs TEXT, error TEXT, metrics TEXT, webhook TEXT, events TEXT,
    removed INTEGER NOT NULL DEFAULT 0, rating TEXT, note TEXT, correction TEXT);
CREATE INDEX IF NOT EXISTS predictions_created ON predictions (created);
CREATE INDEX IF NOT EXISTS predictions_rating ON predictions (rating) WHERE rating IS NOT NULL;
CREATE VIRTUAL TABLE IF NOT EXISTS search USING fts5 (input, output, prefix = '2 3');
CREATE TABLE IF NOT EXISTS trainings (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, status TEXT NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS models (name TEXT PRIMARY KEY, created REAL NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS versions (
    id TEXT NOT NULL, model TEXT NOT NULL, created REAL NOT NULL, data TEXT NOT NULL, PRIMARY KEY (id, model));
CREATE TABLE IF NOT EXISTS removed (name TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS files (id TEXT PRIMARY KEY, created REAL NOT NULL, data TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""

Row = dict[str, Any]


class UnwritableError(CogpressError):
    """The store cannot be written, as on a full disk, so that nothing new may begin."""


class Store:
    """The database and its folder, for one process at a time."""

    def __init__(
        self, folder: Path, *, keep_prompts: bool = True, retention_days: float = 30, retention_count: int = 10_000
    ) -> None:
        """Open or create it, and mark as failed what had not ended when it was last used.

        Args:
            folder: for the database, uploaded files and trained weights.
            keep_prompts: whether to write inputs, outputs and logs.
            retention_days: age at which predictions, trainings and files are removed.
            retention_count: how many predictions are kept; the oldest go first, rated ones only by age.

        Raises:
            CogpressError: the folder is unusable, or another process uses it.
        """
        self.folder = folder = folder.resolve()
        self.keep_prompts = keep_prompts
        self._days, self._count = retention_days, retention_count
        self._pending: list[tuple[str, tuple[Any, ...]]] = []
        self._batch: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._failing = ""
        """Why the last batch could not be written; empty if it was."""
        self._thread = ThreadPoolExecutor(1, "store")
        try:
            # Prompts are for nobody else, and a folder that was there before is not ours to close to others.
            folder.mkdir(0o700, parents=True, exist_ok=True)
            os.close(os.open(folder / "predictions.sqlite", os.O_CREAT | os.O_RDWR, 0o600))
            self._lock = (folder / "lock").open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CogpressError(f"Another playground uses {folder}. Stop it, or choose another folder.") from None
        except OSError as error:
            raise CogpressError(f"Cannot use {folder}: {error.strerror}. Choose another folder.") from None
        try:
            self._database = sqlite3.connect(folder / "predictions.sqlite", check_same_thread=False)
            self._database.row_factory = sqlite3.Row
            self._prepare()
        except sqlite3.Error as error:
            self._lock.close()
            raise CogpressError(
                f"Cannot read {folder / 'predictions.sqlite'} ({error}). Move it away to start afresh."
            ) from None

    def _prepare(self) -> None:
        self._database.execute("PRAGMA journal_mode = WAL")
        # If the machine crashes, the last moments may be lost, never the file; a crash of this process loses nothing.
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.executescript(_SCHEMA)
        with self._database as database:
            database.execute(
                "UPDATE predictions SET status = 'failed', error = ?, completed = ? "
                "WHERE status IN ('starting', 'processing')",
                (CRASHED, time.time()),
            )
            rows = database.execute("SELECT id, data FROM trainings WHERE status IN ('starting', 'processing')")
            for row in rows.fetchall():
                data = json.loads(row["data"]) | {"status": "failed", "error": CRASHED, "completed": time.time()}
                database.execute(
                    "UPDATE trainings SET status = 'failed', data = ? WHERE id = ?", (json.dumps(data), row["id"])
                )
        self._remove_old()

    def secret(self, name: str) -> bytes:
        """A secret of this installation, created on first use. Call it before requests are served."""
        found = self._database.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
        if found is None:
            made = base64.b64encode(secrets.token_bytes(32)).decode()
            with self._database as database:
                database.execute("INSERT INTO settings VALUES (?, ?)", (name, made))
            return base64.b64decode(made)
        return base64.b64decode(found["value"])

    def write(self, statement: str, *values: Any) -> asyncio.Future[None]:
        """Write in the next batch, in the order of the calls.

        Returns:
            a future that is done once it is written. It fails with an `UnwritableError` if that is impossible now:
            then it is kept in memory, and written as soon as it can be.
        """
        self._pending.append((statement, tuple(map(_storable, values))))
        return self._batch or self._begin(0)

    def _begin(self, seconds: float) -> asyncio.Task[None]:
        self._batch = asyncio.get_running_loop().create_task(self._flush(seconds))
        self._batch.add_done_callback(_retrieved)
        return self._batch

    async def _flush(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        async with self._writing:  # in order, even where a batch has to be written again
            pending, self._pending, self._batch = self._pending, [], None
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._commit, pending)
            except sqlite3.OperationalError as error:
                known, self._failing = self._failing, str(error)
                self._pending = pending + self._pending
                if self._batch is None:
                    self._begin(RETRY_SECONDS)
                if not known:
                    print(self._refusal(), flush=True)
                raise self._refusal() from None
            self._failing = ""

    def check_writable(self) -> None:
        """Refuse what would begin while nothing can be written.

        Raises:
            UnwritableError: the last batch could not be written.
        """
        if self._failing:
            raise self._refusal()

    def _refusal(self) -> UnwritableError:
        return UnwritableError(
            f"The playground cannot write to {self.folder} ({self._failing}). Free some disk space; it then goes on."
        )

    def _commit(self, pending: list[tuple[str, tuple[Any, ...]]]) -> None:
        # A version names weights that took hours; even a crash of the machine must not part the two.
        durable = any(re.search(r"\b(versions|removed)\b", statement) for statement, _ in pending)
        self._database.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
        with self._database as database:
            for statement, values in pending:
                database.execute(statement, values)

    async def read(self, query: str, *values: Any) -> list[Row]:
        """The rows of a query, which sees all earlier writes."""
        return (await self.read_page(query, *values))[0]

    async def read_page(
        self, query: str, *values: Any, count: float = math.inf, most_bytes: float = math.inf
    ) -> tuple[list[Row], bool]:
        """The first rows of a query, and whether there are more.

        Args:
            query: sees all earlier writes.
            values: of its parameters.
            count: most rows.
            most_bytes: most characters of all rows' texts; a first row alone may have more.
        """
        if self._batch is not None and not self._failing:
            with contextlib.suppress(sqlite3.Error, UnwritableError):  # told to who wrote it
                await asyncio.shield(self._batch)
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._fetch, query, values, count, most_bytes
        )

    def _fetch(self, query: str, values: tuple[Any, ...], count: float, most: float) -> tuple[list[Row], bool]:
        rows: list[Row] = []
        size = 0
        for row in self._database.execute(query, values):  # which reads one row at a time
            size += sum(len(value) for value in row if isinstance(value, str))
            if len(rows) >= count or (rows and size > most):
                return rows, True
            rows.append(dict(row))
        return rows, False

    # Rows of predictions come from `Prediction.record()`.

    def insert(self, record: Row) -> asyncio.Future[None]:
        """Add a prediction."""
        texts = [json.dumps(record["input"]), *(json.dumps(record[name]) for name in ("metrics", "events"))]
        if not self.keep_prompts:
            texts[0] = "null"
        self.write(
            "INSERT INTO predictions (id, created, status, model, version, source, input, metrics, events, webhook, "
            "removed) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(record[name] for name in ("id", "created", "status", "model", "version", "source")),
            *texts,
            record["webhook"],
            not self.keep_prompts,
        )
        return self.write(
            "INSERT INTO search (rowid, input, output) SELECT seq, ?, '' FROM predictions WHERE id = ?",
            searched_input(record["input"]) if self.keep_prompts else "",
            record["id"],
        )

    def update(self, record: Row) -> asyncio.Future[None]:
        """Save how a prediction ended."""
        kept = self.keep_prompts
        self.write(
            "UPDATE predictions SET status = ?, started = ?, completed = ?, output = ?, logs = ?, error = ?, "
            "metrics = ? WHERE id = ?",
            *(record[name] for name in ("status", "started", "completed")),
            json.dumps(record["output"] if kept else None),
            json.dumps(record["logs"] if kept else ""),
            # An error may quote the input.
            json.dumps(record["error"] if kept or not record["error"] else "The reason was not stored (keep_prompts)."),
            json.dumps(record["metrics"] if kept else _plain(record["metrics"])),
            record["id"],
        )
        return self.write(
            "UPDATE search SET output = ? WHERE rowid = (SELECT seq FROM predictions WHERE id = ?)",
            searched_output(record["output"]) if kept else "",
            record["id"],
        )

    async def find(self, identifier: str) -> Row | None:
        """A prediction by its id, with its rating."""
        rows = await self.read("SELECT * FROM predictions WHERE id = ?", identifier)
        return parsed(rows[0]) if rows else None

    async def remove_old(self) -> None:
        """Remove predictions, trainings and files beyond the retention limits; trained versions stay."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._remove_old)

    def _remove_old(self) -> None:
        before = time.time() - self._days * 86400
        with self._database as database:
            ended = "status NOT IN ('starting', 'processing')"
            gone = [
                row["seq"]
                for row in database.execute(
                    f"SELECT seq FROM predictions WHERE {ended} AND (created < ? OR (rating IS NULL AND seq <= ("
                    "SELECT seq FROM predictions ORDER BY seq DESC LIMIT 1 OFFSET ?)))",
                    (before, self._count),
                )
            ]
            database.executemany("DELETE FROM search WHERE rowid = ?", ((seq,) for seq in gone))
            database.executemany("DELETE FROM predictions WHERE seq = ?", ((seq,) for seq in gone))
            database.execute(
                f"DELETE FROM trainings WHERE {ended} AND json_extract(data, '$.created') < ?",
                (before,),
            )
            files = [row["id"] for row in database.execute("SELECT id FROM files WHERE created < ?", (before,))]
            database.executemany("DELETE FROM files WHERE id = ?", ((name,) for name in files))
        for name in files:
            (self.folder / "files" / name).unlink(missing_ok=True)

    async def close(self) -> None:
        """Write what is pending and release the folder."""
        if self._batch is not None:
            await asyncio.gather(self._batch, return_exceptions=True)
        if self._batch is not None:  # it cannot be written, and nothing will change that
            self._batch.cancel()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._database.close)
        self._thread.shutdown()
        self._lock.close()


def parsed(row: Row) -> Row:
    """A prediction's row with its JSON decoded."""
    for name in ("input", "output", "metrics", "events"):
        row[name] = json.loads(row[name]) if row[name] else None
    for name in ("logs", "error"):
        text = row[name]
        row[name] = json.loads(text) if text and text[0] == '"' else None if text == "null" else text
    return row


INPUT_BREAK = "\x1f"
"""Between the indexed texts of two inputs."""

_MAIN = ("prompt", "fields", "messages")


def searched_input(inputs: Row) -> str:
    """The texts of an input to index, the main one first: without file contents, and cut at `SEARCHED`."""

    def rank(name: str) -> int:
        return _MAIN.index(name) if name in _MAIN else len(_MAIN) + (not isinstance(inputs[name], str))

    texts = ("\n".join(_texts(inputs[name])) for name in sorted(inputs, key=rank))
    kept = [text[:SEARCHED].replace(INPUT_BREAK, " ") for text in texts if text.strip()]
    return INPUT_BREAK.join(kept)[:SEARCHED].replace("\0", " ")


def searched_output(output: Any) -> str:
    """The text of an output to index, cut at `SEARCHED`: the chunks of an answer are one text."""
    separator = "" if isinstance(output, list) else "\n"
    return separator.join(_texts(output))[:SEARCHED].replace("\0", " ")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if not value.startswith("data:"):
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif value is not None:
        yield json.dumps(value)


def _storable(value: Any) -> Any:
    """Replace lone surrogates, which UTF-8 cannot encode, by question marks; one would fail the whole batch."""
    if isinstance(value, str) and not value.isascii():
        return value.encode(errors="replace").decode()
    return value


def _plain(metrics: Row) -> Row:
    """Only the numeric metrics: others, such as log-probabilities, hold text."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _retrieved(task: asyncio.Task[None]) -> None:
    """Report a batch's error once, whether or not anyone awaits it."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, UnwritableError):  # which is told when it begins
        print(f"Cannot write to the store: {error}. Free disk space, or check permissions.", flush=True)
