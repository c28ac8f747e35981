"""Training lifecycle: queue, run one at a time through Cog's training endpoint, install the weights as a version."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx

from cogpress.cog import client, process
from cogpress.errors import CogpressError
from cogpress.http import reason
from cogpress.playground.background import Background
from cogpress.playground.catalog import Catalog, full_name
from cogpress.playground.files import Files
from cogpress.playground.keys import Keys
from cogpress.playground.records import ENDED, Options, QueueFullError, Version, new_id, now
from cogpress.playground.store import Store, UnwritableError
from cogpress.weights import archive, fetch

_BLOCK = 4 << 20  # bytes; a multiple of four, because base64 is decoded in blocks

MOST_WAITING = 16
"""How many may wait or run: each keeps its inputs in memory, and they run one at a time."""

_STOPPED = "The playground was stopped before this training ended. Start it again."


class Trainings:
    """All trainings."""

    def __init__(self, store: Store, catalog: Catalog, files: Files, keys: Keys, root: Path) -> None:
        """Stops a trainer that a killed run left behind; nothing runs yet.

        Args:
            store: where trainings are kept.
            catalog: gets the new versions.
            files: keeps the trained weights for download.
            keys: for the URL to which the runtime sends logs.
            root: the project's folder, whose cog.yaml names the training function.
        """
        self.send: Callable[[dict[str, Any], str], Coroutine[Any, Any, None]] = _ignore
        """Sends a webhook, given a training's record and the event."""
        self._store, self._catalog, self._files, self._keys, self._root = store, catalog, files, keys, root
        self._alive: dict[str, dict[str, Any]] = {}
        self._waiting: deque[tuple[dict[str, Any], dict[str, Any]]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._server: process.Server | None = None
        self._noted = store.folder / "trainer.json"
        process.end_noted(self._noted)  # a killed run leaves its trainer, with the GPU
        self._background = Background()

    async def create(
        self, version: Version, destination: str, inputs: dict[str, Any], options: Options
    ) -> dict[str, Any]:
        """Validate and queue a training.

        Args:
            version: what is trained.
            destination: the model that gets the new version, created if there is none.
            inputs: by name.
            options: see `Options`.

        Raises:
            InvalidInput: the schema rejects the inputs.
            QueueFullError: too many wait.
            CogpressError: the version cannot be trained here, or the destination is not a valid name.
        """
        destination = full_name(destination)
        if not process.read_cog_yaml(self._root).get("train") or not version.source.startswith("folder:"):
            raise CogpressError("This version cannot be trained here: only the project's own weights can.")
        if len(self._alive) >= MOST_WAITING:
            raise QueueFullError(f"{MOST_WAITING} trainings are queued or running. Start it once one has ended.")
        payload = {name: value for name, value in inputs.items() if value is not None}
        version.check(payload, "TrainingInput")
        record: dict[str, Any] = {
            "id": new_id(),
            "model": version.model,
            "version": version.id,
            "destination": destination,
            "status": "starting",
            "input": version.redacted(payload, "TrainingInput"),
            "output": None,
            "error": None,
            "logs": "",
            "metrics": {},
            "created": now(),
            "started": None,
            "completed": None,
            "webhook": options.webhook,
            "events": options.webhook_events,
            "base_url": options.base_url,
        }
        self._store.check_writable()
        self._alive[record["id"]] = record
        await self._save(record, "INSERT INTO trainings (status, data, id) VALUES (?, ?, ?)")
        self._waiting.append((record, payload))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.get_running_loop().create_task(self._work())
        return dict(record)

    async def _save(
        self, record: dict[str, Any], statement: str = "UPDATE trainings SET status = ?, data = ? WHERE id = ?"
    ) -> None:
        kept = record if self._store.keep_prompts else {**record, "input": None, "logs": ""}
        with contextlib.suppress(UnwritableError):  # the store keeps it, and writes it later
            await self._store.write(statement, record["status"], json.dumps(kept), record["id"])

    def now(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the store, brought up to date if its training has not ended."""
        return self._alive.get(row["id"]) or dict(json.loads(row["data"]))

    async def record(self, identifier: str) -> dict[str, Any] | None:
        """A training's record; None if there is none."""
        if identifier in self._alive:
            return self._alive[identifier]
        rows = await self._store.read("SELECT id, data FROM trainings WHERE id = ?", identifier)
        return self.now(rows[0]) if rows else None

    async def cancel(self, identifier: str) -> None:
        """Cancel a training that waits or runs."""
        record = self._alive.get(identifier)
        if record is None or record["status"] in ENDED:
            return
        record["canceled"] = True
        if record["started"] is None:
            await self._end(record, "canceled")
        elif self._server is not None:
            with contextlib.suppress(httpx.HTTPError):
                async with httpx.AsyncClient(trust_env=False, timeout=10) as http:
                    await http.post(f"{self._server.url}/trainings/{identifier}/cancel")
            for _ in range(40):
                if record["status"] in ENDED:
                    break
                await asyncio.sleep(0.05)

    def expects(self, identifier: str, key: str) -> bool:
        """Whether reports are awaited of a training, and the key is the one that its runtime was given."""
        return identifier in self._alive and self._keys.match("training", identifier, key)

    def report(self, identifier: str, body: dict[str, Any]) -> None:
        """Take the log that the runtime reports of a training."""
        record = self._alive.get(identifier)
        if record is None or record["status"] in ENDED:
            return
        if isinstance(body.get("logs"), str) and body["logs"] != record["logs"]:
            record["logs"] = body["logs"]
            self._notify(record, "logs")
        if isinstance(body.get("metrics"), dict):
            record["metrics"].update(body["metrics"])

    def _notify(self, record: dict[str, Any], event: str) -> None:
        if record["webhook"] and (record["events"] is None or event in record["events"]):
            self._background.start(self.send(dict(record), event))

    async def _work(self) -> None:
        while self._waiting:
            record, payload = self._waiting.popleft()
            if record["status"] in ENDED:
                continue
            try:
                await self._train(record, payload)
            except CogpressError as error:
                await self._end(record, "canceled" if record.get("canceled") else "failed", error=str(error))
            except asyncio.CancelledError:
                await self._end(record, "failed", error=_STOPPED)
                raise
            except Exception:  # noqa: BLE001 - a training must never stay open
                traceback.print_exc()
                told = "The playground failed on this training; its log says why. Start it again."
                await self._end(record, "failed", error=told)

    async def _end(self, record: dict[str, Any], status: str, *, error: str | None = None, output: Any = None) -> None:
        if record["status"] in ENDED:
            return
        ended = time.time()
        record |= {"error": error if status == "failed" else None, "output": output, "completed": ended}
        record["metrics"].setdefault("predict_time", round(ended - (record["started"] or ended), 6))
        record["metrics"]["total_time"] = round(ended - record["created"], 6)
        record["status"] = status
        await self._save(record)
        self._alive.pop(record["id"], None)
        self._notify(record, "completed")

    async def _train(self, record: dict[str, Any], payload: dict[str, Any]) -> None:
        identifier = record["id"]
        record |= {"status": "processing", "started": time.time()}
        await self._save(record)
        self._notify(record, "start")
        inputs = await self._files.rewrite(payload, True)
        part = self._store.folder / "trained" / f"{identifier}.part"
        part.parent.mkdir(0o700, exist_ok=True)
        log = self._store.folder / "training.log"
        self._catalog.training.add(identifier)
        self._server = made = process.Server(self._root, mode="train", log=log)
        try:
            await asyncio.to_thread(made.start)
            process.note(self._noted, [made])
            await asyncio.to_thread(made.wait_ready, 300.0)
            if record.get("canceled"):
                await self._end(record, "canceled")
                return
            key = self._keys.make("training", identifier)
            body = {
                "input": inputs,
                "webhook": f"{self._files.loopback_url}/hooks/trainings/{identifier}/{key}",
                "webhook_events_filter": ["logs"],
            }
            answer = await self._request(f"{made.url}/trainings/{identifier}", body, part)
            if isinstance(answer.get("metrics"), dict):
                record["metrics"].update(answer["metrics"])
            record["logs"] = answer.get("logs") or record["logs"]
            if answer.get("status") == "canceled":
                await self._end(record, "canceled")
            elif answer.get("status") != "succeeded":
                raise CogpressError(client.plain_error(str(answer.get("error") or answer.get("detail") or "")))
            else:
                await asyncio.to_thread(made.stop)  # the new version may need its memory
                await self._end(record, "succeeded", output=await self._install(record, part))
        finally:
            self._server = None
            await asyncio.to_thread(made.stop)
            self._noted.unlink(missing_ok=True)
            part.unlink(missing_ok=True)
            part.with_suffix(".answer").unlink(missing_ok=True)
            self._catalog.training.discard(identifier)

    async def _request(self, url: str, body: dict[str, Any], part: Path) -> dict[str, Any]:
        """Run a training; returns the response without the file in it, which goes to `part`."""
        whole = part.with_suffix(".answer")
        try:
            async with (
                httpx.AsyncClient(trust_env=False, timeout=httpx.Timeout(10, read=None)) as http,
                http.stream("PUT", url, json=body) as response,
            ):
                with whole.open("wb") as file:
                    async for block in response.aiter_bytes(_BLOCK):
                        await asyncio.to_thread(file.write, block)
        except httpx.HTTPError as error:
            raise CogpressError(
                f"The training's server stopped during the training ({reason(error)}). "
                f"See the end of {self._store.folder / 'training.log'}."
            ) from None
        return await asyncio.to_thread(_split, whole, part)

    async def _install(self, record: dict[str, Any], part: Path) -> dict[str, Any]:
        """Make the trained weights a version of the destination."""
        if not part.is_file():
            raise CogpressError("The training's output has no file named weights, so there is no new version.")
        folder = self._store.folder / "trained" / record["id"]
        await asyncio.to_thread(archive.unpack, part, folder, lambda new: fetch.leave_out(new, "the training's tar"))
        label = f"trained {time.strftime('%Y-%m-%d %H:%M')}"
        version = await self._catalog.add(record["destination"], f"folder:{folder}", label=label)
        with part.open("rb") as content:
            file = await self._files.add(content, "weights.tar", "application/x-tar", {"training": record["id"]})
        weights = self._files.download(record["base_url"], file.id)
        return {"version": f"{version.model}:{version.id}", "weights": weights}

    async def close(self) -> None:
        """Fail whatever waits or runs."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        for record in list(self._alive.values()):
            await self._end(record, "failed", error=_STOPPED)


async def _ignore(_record: dict[str, Any], _event: str) -> None:
    pass


def _split(whole: Path, part: Path) -> dict[str, Any]:
    """Decode the first data URL in a JSON response to `part`, without holding it in memory; returns the rest."""
    with whole.open("rb") as file:
        head = file.read(1 << 20)
        mark = head.find(b";base64,")
        start = head.rfind(b'"data:', 0, mark) if mark >= 0 else -1
        if start < 0:
            text = head + file.read()
        else:
            file.seek(mark + len(b";base64,"))
            with part.open("wb") as out:
                tail = _decode(file, out)
            text = head[:start] + b'"' + tail + file.read()
    try:
        answer = json.loads(text)
    except ValueError:
        raise CogpressError(f"The training's server did not answer with JSON: {text[:200]!r}") from None
    return answer if isinstance(answer, dict) else {}


def _decode(file: Any, out: Any) -> bytes:
    """Decode base64 up to the closing quote; returns what was read from the quote on."""
    rest = b""
    while block := file.read(_BLOCK):
        block = rest + block
        end = block.find(b'"')
        if end >= 0:
            out.write(base64.b64decode(block[:end], validate=True))
            return bytes(block[end:])
        whole = len(block) // 4 * 4
        out.write(base64.b64decode(block[:whole], validate=True))
        rest = block[whole:]
    raise CogpressError("The training's response was cut off.")
