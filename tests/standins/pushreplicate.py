"""The stand-in for Replicate in tests of a push: the playground with management, to which images can be pushed.

A push copies what `.dockerignore` lets through, and a real Cog server of that copy becomes the version. The stand-in
records requests and answers with faults on demand.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.standins.localreplicate import TOKEN, Local


class PushReplicate(Local):
    """The stand-in as a process; see `Local`."""

    program = Path(__file__)

    def __init__(self, folder: Path, **more: Any) -> None:
        super().__init__(folder, [], data=folder / "data", token=TOKEN, **more)

    def rate(self, seconds: float) -> None:
        """Allow one prediction in so many seconds, as to an account without credit; 0 allows all."""
        assert self.ask("POST", "/standin/rate", seconds).status_code == 200

    def script(self, *states: dict[str, Any]) -> None:
        """Make the next prediction go through these states, one a request, without a model; its stream is cut."""
        assert self.ask("POST", "/standin/script", states).status_code == 200

    def fault(
        self, method: str, route: str, status: int, times: int = 1, told: dict[str, Any] | None = None, **headers: str
    ) -> None:
        """Answer the next requests for a route with an error that says `told`; in `headers`, _ stands for -."""
        body = {"method": method, "route": route, "status": status, "times": times, "body": told or {}}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        assert self.ask("POST", "/standin/fault", {**body, "headers": named}).status_code == 200

    def asked(self) -> list[dict[str, Any]]:
        """Requests since the last call, without the stand-in's own routes."""
        return list(self.ask("POST", "/standin/asked").json())

    def changes(self) -> list[str]:
        """Requests since the last call that change something, as `METHOD route`."""
        return [f"{one['method']} {one['path']}" for one in self.asked() if one["method"] != "GET"]


class Standin:
    """Around the application of the playground."""

    def __init__(self, app: Any, parts: Any, folder: Path, management: Any) -> None:
        self.app, self.parts, self.folder, self.management = app, parts, folder, management
        self.faults: list[dict[str, Any]] = []
        self.scripts: list[list[dict[str, Any]]] = []
        self.scripted: dict[str, list[dict[str, Any]]] = {}
        self.rate = 0.0
        self.next = 0.0
        self.asked: list[dict[str, Any]] = []
        self.servers: dict[str, Any] = {}
        self.pushes = 0
        self.images: dict[str, Path] = {}
        self.train, parts.trainings.create = parts.trainings.create, self.create_training

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                for server in self.servers.values():
                    await asyncio.to_thread(server.stop)
            return
        if scope["path"].startswith("/standin/"):
            body = b""
            while (message := await receive()).get("more_body"):
                body += message["body"]
            body += message.get("body", b"")
            status, content = await self.answer(scope["path"].rpartition("/")[2], json.loads(body or b"null"))
            await reply(send, status, content)
            return
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        noted = {"method": scope["method"], "path": scope["path"], "token": headers.get("authorization")}
        noted["cancel_after"] = headers.get("cancel-after")
        if scope["path"].startswith("/v1/"):
            self.asked.append(noted)
        for fault in self.faults:
            if fault["times"] and fault["method"] == scope["method"] and scope["path"].startswith(fault["route"]):
                fault["times"] -= 1
                error = {"title": "fault", "detail": "the stand-in was told to", "status": fault["status"]}
                await reply(send, fault["status"], {**error, **fault.get("body", {})}, fault["headers"])
                return
        if scope["method"] == "POST" and scope["path"] == "/v1/predictions":
            if self.rate and time.monotonic() < self.next:
                # As Replicate: the pause in the body alone.
                left = self.next - time.monotonic()
                await reply(send, 429, {"detail": "Request was throttled.", "status": 429, "retry_after": left})
                return
            self.next = time.monotonic() + self.rate
            if self.scripts:
                await reply(send, 202, self.begin(self.scripts.pop(0), f"{scope['scheme']}://{headers['host']}"))
                return
        name = scope["path"].removeprefix("/v1/predictions/").removesuffix("/cancel")
        if name in self.scripted:
            left = self.scripted[name]
            await reply(send, 200, left.pop(0) if len(left) > 1 else left[0])
            return
        if scope["path"].startswith("/cut/"):
            await cut(send)
            return
        await self.app(scope, receive, send)

    def begin(self, states: list[dict[str, Any]], base: str) -> dict[str, Any]:
        """A prediction that is only told: one state after the other, whoever asks."""
        name = f"told{len(self.scripted)}"
        common = {"id": name, "status": "starting", "logs": "", "error": None, "output": None, "input": {}}
        common["urls"] = {"get": f"{base}/v1/predictions/{name}", "stream": f"{base}/cut/{name}"}
        self.scripted[name] = [{**common, **state} for state in states]
        return {**common, **states[0]}

    async def answer(self, what: str, body: Any) -> tuple[int, Any]:
        if what == "fault":
            self.faults.append(body)
            return 200, None
        if what == "rate":
            self.rate, self.next = body, 0.0
            return 200, None
        if what == "script":
            self.scripts.append(body)
            return 200, None
        if what == "asked":
            found, self.asked = self.asked, []
            return 200, found
        return await self.push(body)

    async def push(self, body: dict[str, Any]) -> tuple[int, Any]:
        from cogpress.cog.process import Server
        from cogpress.preflight.ignore import Ignore, context

        model = self.parts.catalog.models.get(body["model"])
        if model is None:
            return 404, f"Unable to find existing Replicate model for r8.im/{body['model']}."
        root = Path(body["root"])
        entries = context(root, Ignore((root / ".dockerignore").read_text()))
        for layer in body.get("layers", []):
            if not any(entry.name.startswith(f"{layer}/") for entry in entries):
                return 400, f'failed to compute cache key: "/{layer}": not found'
        print_, copied = await asyncio.to_thread(self.copy, Path(body["root"]))
        if print_ not in self.servers:
            log = self.folder / f"{model.name}-{print_[:8]}.log"
            self.servers[print_] = server = Server(copied, log=log)
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(server.wait_ready, 240.0)
        # Each push is a version of its own, of an unchanged image too.
        self.pushes += 1
        added = await self.parts.catalog.add(body["model"], self.servers[print_].url)
        digest = hashlib.sha256(f"{self.pushes} {print_}".encode()).hexdigest()
        added = model.versions[-1] = replace(added, id=digest)
        self.images[added.id] = copied
        self.management.facts.setdefault(body["model"], {})["separate_weights"] = str(body["separate_weights"])
        return 200, {"id": added.id}

    async def create_training(self, version: Any, destination: str, *more: Any) -> Any:
        """Train the pushed image instead of the playground's own project; the destination must exist."""
        self.parts.catalog.model(destination)
        self.management.trainers.add(version.id)
        if version.id in self.images:
            image = self.images[version.id]
            self.parts.trainings._root = self.parts.sources.root = image
            version = replace(version, source=f"folder:{image}")
        return await self.train(version, destination, *more)

    def copy(self, root: Path) -> tuple[str, Path]:
        """A hash and a copy of what would enter the image."""
        from cogpress.preflight.ignore import Ignore, context

        entries = context(root, Ignore((root / ".dockerignore").read_text()))
        digest = hashlib.sha256()
        for entry in entries:
            if not entry.name.startswith(".cog/"):
                digest.update(f"{entry.name}\0".encode() + (root / entry.name).read_bytes())
        place = self.folder / "images" / digest.hexdigest()
        for entry in entries:
            (place / entry.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / entry.name, place / entry.name)
        return digest.hexdigest(), place


async def cut(send: Any) -> None:
    """A stream that breaks off after its first piece."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    await send({"type": "http.response.body", "body": b"event: output\nid: 1\ndata: piece\n\n"})


async def reply(send: Any, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    named = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status,
                "headers": [(b"content-type", b"application/json"), *named]})  # fmt: skip
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


def main() -> None:
    from cogpress.playground import app
    from tests.standins import localreplicate
    from tests.standins.management import Management

    application, routes, management = app.application, app.routes, Management()

    def managed(settings: Any, parts: Any = None, **more: Any) -> Any:
        made = parts or app.build(settings)
        return Standin(application(settings, made, **more), made, settings.folder, management)

    app.application = managed  # type: ignore[assignment]
    app.routes = lambda parts, secret: [*management.routes(parts), *routes(parts, secret)]
    localreplicate.main()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
