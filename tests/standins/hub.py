"""A stand-in for the Hugging Face Hub, for the Hub's own client library.

It keeps repositories, branches, commits and large files in memory, checks tokens and sha256, and fails on demand. It
implements the LFS transfer, which HF_HUB_DISABLE_XET=1 selects. Of the default transfer, Xet, it accepts the requests
without unpacking their chunks, whose format is private to the Hub; it then takes a file's sha256 from the list that the
client sends, and its content from `local`.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITE, READ, STRANGER = "hf_write0123456789", "hf_read0123456789", "hf_stranger0123456789"
LICENCES = {"apache-2.0", "mit", "llama3.1", "other"}


@dataclass(frozen=True)
class Blob:
    """One file in a commit."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git(self) -> str:
        data = f"version lfs\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode() if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git


@dataclass
class Repository:
    """Branches point to commits, and commits hold files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, Blob]) -> str:
        described = json.dumps([self.branches.get(branch), {name: blob.etag for name, blob in files.items()}])
        sha = hashlib.sha1(described.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def find(self, revision: str) -> str | None:
        sha = self.branches.get(revision, revision)
        return sha if sha in self.commits else None


@dataclass
class Fault:
    """A fault: an HTTP status, `cut` (in a body), `lost` (done, but the answer is never sent) or `mute` (no answer on
    an open connection).
    """

    method: str
    path: str
    kind: int | str
    times: int


class StandIn:
    """The Hub: its `url`, its content, and a log of requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.local: dict[str, bytes] = {}
        self.shards: list[bytes] = []
        self.part_bytes: int | None = None
        self.always_public = False
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.url = ""

    def fail(self, method: str, path: str, kind: int | str, times: int = 1) -> None:
        """Make the next requests with a matching path fail."""
        self.faults.append(Fault(method, path, kind, times))

    def fault(self, method: str, path: str) -> int | str | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault.kind
        return None

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]

    def files(self, repo: str, revision: str = "main") -> dict[str, Blob]:
        repository = self.repositories[repo]
        return repository.commits[repository.find(revision) or ""]


@contextmanager
def running() -> Iterator[StandIn]:
    """Run a stand-in on a free port of the loopback interface."""
    hub = StandIn()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, error: str, code: str = "") -> None:
        self.status, self.error, self.code = status, error, code


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # a head and its body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.query = parse_qs(parts.query)
        self.hub.requests.append(f"{self.command} {path}")
        fault = self.hub.fault(self.command, path)
        if fault == "cut":
            self.rfile.read(int(self.headers.get("Content-Length") or 2000) // 2)
            self._reset()
            return
        body = self._body()
        if fault == "mute":
            threading.Event().wait(2)
            self._reset()
            return
        try:
            if isinstance(fault, int) and fault >= 500:
                self._send(fault, b"<html>Bad gateway</html>", {"Content-Type": "text/html"})
                return
            if isinstance(fault, int):
                raise _Refused(fault, "The Hub has a bad day.")
            answer = self._route(path, body)
        except _Refused as refused:
            self._send(
                refused.status,
                json.dumps({"error": refused.error, "errors": [{"message": refused.error}]}).encode(),
                {"X-Error-Message": refused.error, **({"X-Error-Code": refused.code} if refused.code else {})},
            )
            return
        if fault == "lost":
            self._reset()
        elif isinstance(answer, tuple):
            self._send(200, *answer)
        else:
            self._send(200, json.dumps(answer).encode())

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # Authentication

    def _user(self) -> str | None:
        given = self.headers.get("Authorization", "")
        if not given:
            return None
        known = {f"Bearer {WRITE}": "ada", f"Bearer {READ}": "reader", f"Bearer {STRANGER}": "stranger"}
        if given not in known:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return known[given]

    def _may_write(self) -> None:
        if self._user() != "ada":
            raise _Refused(403, "You don't have the rights to write to the namespace my-team")

    def _repository(self, repo: str) -> Repository:
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and self._user() not in ("ada", "reader")):
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return found

    def _commit(self, repository: Repository, revision: str) -> str:
        sha = repository.find(revision)
        if sha is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # Routes

    def _route(self, path: str, body: bytes) -> Any:
        for method, pattern, answer in _ROUTES:
            if (found := re.fullmatch(pattern, path)) and self.command in method.split():
                return getattr(self, answer)(body, *found.groups())
        raise _Refused(501, f"The stand-in has no {self.command} {path}")

    def _whoami(self, _body: bytes) -> Any:
        name = self._user()
        if name is None:
            raise _Refused(401, "Invalid username or password.")
        role = "read" if name == "reader" else "write"
        return {"type": "user", "name": name, "auth": {"type": "access_token", "accessToken": {"role": role}}}

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        self._may_write()
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repositories:
            raise _Refused(409, "You already created this model repo")
        private = asked.get("visibility") == "private" and not self.hub.always_public
        repository = self.hub.repositories[repo] = Repository(private)
        repository.add("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)})
        return {"url": f"{self.hub.url}/{repo}", "name": repo}

    def _branch(self, _body: bytes, repo: str, branch: str) -> Any:
        self._may_write()
        repository = self._repository(repo)
        if branch in repository.branches:
            raise _Refused(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return {}

    def _info(self, _body: bytes, repo: str, revision: str | None = None) -> Any:
        repository = self._repository(repo)
        sha = self._commit(repository, revision or "main")
        files = repository.commits[sha]
        card = next(
            (yaml.safe_load(blob.data.split(b"---")[1]) for name, blob in files.items() if name == "README.md"), None
        )
        siblings = [
            {"rfilename": item.pop("path"), "blobId": item.pop("oid"), **item} for item in map(_listed, files.items())
        ]
        return {"id": repo, "sha": sha, "private": repository.private, "siblings": siblings, "cardData": card}

    def _tree(self, _body: bytes, repo: str, revision: str) -> Any:
        repository = self._repository(repo)
        return [_listed(item) for item in repository.commits[self._commit(repository, revision)].items()]

    def _validate(self, body: bytes) -> Any:
        data = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        if data.get("license") not in LICENCES:
            raise _Refused(400, f'"license" must be one of {sorted(LICENCES)}')
        return {"errors": [], "warnings": []}

    def _preupload(self, body: bytes, repo: str, revision: str) -> Any:
        self._may_write()
        repository = self._repository(repo)
        there = repository.commits[self._commit(repository, revision)]
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                    "shouldIgnore": False,
                    "oid": there[file["path"]].etag if file["path"] in there else None,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _batch(self, body: bytes, repo: str) -> Any:
        self._may_write()
        self._repository(repo)
        return {"transfer": "basic", "objects": [self._actions(repo, item) for item in json.loads(body)["objects"]]}

    def _actions(self, repo: str, item: dict[str, Any]) -> dict[str, Any]:
        oid, size, hub = item["oid"], item["size"], self.hub
        if oid in hub.stored:
            return item
        place = f"{hub.url}/storage/{oid}"
        upload: dict[str, Any] = {"href": f"{place}?signature=secret"}
        if hub.part_bytes and size > hub.part_bytes:
            numbers = range(1, -(-size // hub.part_bytes) + 1)
            links = {str(number): f"{place}/{number}?signature=secret" for number in numbers}
            upload = {"href": f"{place}/complete", "header": {"chunk_size": str(hub.part_bytes), **links}}
        verify = {"href": f"{hub.url}/{repo}.git/info/lfs/objects/verify"}
        return {**item, "actions": {"upload": upload, "verify": verify}}

    def _store(self, body: bytes, oid: str, part: str | None = None) -> Any:
        # Like the real storage, accept a signed URL and no other credentials beside it.
        if self.query.get("signature") != ["secret"] or "Authorization" in self.headers:
            raise _Refused(400, "Only one way to sign in is allowed")
        if part is not None:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
            return b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}
        return self._keep(oid, body)

    def _keep(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(422, "The content is not that of its sha256")
        self.hub.stored[oid] = body
        return b"", {}

    def _complete(self, body: bytes, oid: str) -> Any:
        parts = self.hub.parts[oid]
        for told in json.loads(body)["parts"]:
            if told["etag"] != f'"{hashlib.md5(parts[told["partNumber"]]).hexdigest()}"':
                raise _Refused(400, "A part's ETag is another")
        return self._keep(oid, b"".join(parts[number] for number in sorted(parts)))

    def _verify(self, body: bytes, _repo: str) -> Any:
        self._may_write()
        told = json.loads(body)
        if len(self.hub.stored.get(told["oid"], b"")) != told["size"]:
            raise _Refused(404, "Object is not there")
        return {}

    def _commit_all(self, body: bytes, repo: str, revision: str) -> Any:
        self._may_write()
        repository = self._repository(repo)
        parent = self._commit(repository, revision)
        files = dict(repository.commits[parent])
        for line in body.decode().splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            if kind == "header" and value.get("parentCommit", parent) != parent:
                raise _Refused(412, "A commit has happened since. Please refresh and try again.")
            if kind == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                files[value["path"]] = Blob(self._large(value["oid"]), True)
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = repository.add(revision, files)
        return {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}

    def _large(self, oid: str) -> bytes:
        if any(_in_shard(oid, shard) for shard in self.hub.shards):
            return self.hub.local[oid]
        if oid not in self.hub.stored:
            raise _Refused(400, "A large file of the commit was never sent")
        return self.hub.stored[oid]

    def _xet_token(self, _body: bytes, repo: str, _revision: str) -> Any:
        self._may_write()
        self._repository(repo)
        return {"casUrl": f"{self.hub.url}/xet", "accessToken": "xet", "exp": 9_999_999_999}

    def _xet(self, body: bytes, kind: str) -> Any:
        if self.headers.get("Authorization") != "Bearer xet":
            raise _Refused(401, "A token of another service")
        if kind == "shards":
            self.hub.shards.append(body)
            return json.dumps({"type": "result", "result": 1}).encode() + b"\n", {}
        if kind == "xorb-grants":
            return {"was_inserted": True}
        raise _Refused(404, "No such chunk")

    def _resolve(self, _body: bytes, repo: str, revision: str, name: str) -> Any:
        repository = self._repository(repo)
        sha = self._commit(repository, revision)
        blob = repository.commits[sha].get(name)
        if blob is None:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        return blob.data, {"ETag": f'"{blob.etag}"', "X-Repo-Commit": sha, "Content-Type": "application/octet-stream"}


def _listed(item: tuple[str, Blob]) -> dict[str, Any]:
    name, blob = item
    lfs = {"oid": blob.sha256, "sha256": blob.sha256, "size": len(blob.data), "pointerSize": 134}
    return {"type": "file", "path": name, "oid": blob.git, "size": len(blob.data), **({"lfs": lfs} if blob.lfs else {})}


def _in_shard(oid: str, shard: bytes) -> bool:
    """Whether Xet's list of files names this sha256, in little-endian words of eight bytes."""
    digest = bytes.fromhex(oid)
    return digest in shard or b"".join(digest[at : at + 8][::-1] for at in range(0, 32, 8)) in shard


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", "_whoami"),
    ("POST", r"/api/repos/create", "_create"),
    ("POST", r"/api/validate-yaml", "_validate"),
    ("GET", rf"/api/models/{_REPO}", "_info"),
    ("GET", rf"/api/models/{_REPO}/revision/(.+)", "_info"),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)", "_tree"),
    ("POST", rf"/api/models/{_REPO}/branch/(.+)", "_branch"),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", "_preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", "_commit_all"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "_batch"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", "_verify"),
    ("PUT", r"/storage/([0-9a-f]{64})(?:/(\d+))?", "_store"),
    ("POST", r"/storage/([0-9a-f]{64})/complete", "_complete"),
    ("GET", rf"/api/models/{_REPO}/xet-write-token/(.+)", "_xet_token"),
    ("GET POST", r"/xet/v\d/(chunks|xorb-grants|shards).*", "_xet"),
    ("HEAD GET", rf"/{_REPO}/resolve/([^/]+)/(.+)", "_resolve"),
]
