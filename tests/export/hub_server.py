"""A small Hub on 127.0.0.1 for `huggingface_hub` itself to talk to: accounts, repositories, branches, commits, large files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "q" * 34
READ_ONLY = "hf_" + "r" * 34
OWNERS = ("ada", "lab")
"""The account's own namespace and an organisation that it may write to."""


@dataclass
class Repo:
    """Visibility, branch -> files, commits as (branch, summary)."""

    private: bool
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b""}})
    commits: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Hub:
    """The server's state. large: files are asked for over git-lfs. cut: a request whose line holds this text loses its line.

    status: (part of a request's line, status, message) answers that request with an error.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    large: bool = False
    cut: str = ""
    status: tuple[str, int, str] = ("", 0, "")


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {path}"
        self.hub.requests.append(line)
        if self.hub.cut and self.hub.cut in line:
            self.close_connection = True
            self.connection.close()
            return
        if self.hub.status[1] and self.hub.status[0] in line:
            self._send(self.hub.status[1], {"error": self.hub.status[2]})
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if path.startswith("/lfs/"):
            self.hub.stored[path.removeprefix("/lfs/")] = body
            self._send(200, {})
            return
        if token not in (TOKEN, READ_ONLY):
            self._send(401, {"error": "Invalid credentials in Authorization header"})
            return
        for pattern, method in _ROUTES:
            if found := re.fullmatch(pattern, line):
                status, content = method(self, token, body, *found.groups())
                self._send(status, content)
                return
        self._send(404, {"error": f"no such page: {line}"})

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def _send(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status >= 400:
            self.send_header("X-Error-Message", str(content.get("error")))
        self.end_headers()
        self.wfile.write(data)

    def _whoami(self, token: str, body: bytes) -> tuple[int, Any]:
        role = "read" if token == READ_ONLY else "write"
        return 200, {"name": OWNERS[0], "orgs": [{"name": OWNERS[1]}], "auth": {"accessToken": {"role": role}}}

    def _create(self, token: str, body: bytes) -> tuple[int, Any]:
        asked = json.loads(body)
        owner = asked.get("organization") or OWNERS[0]
        name = f"{owner}/{asked['name']}"
        if owner not in OWNERS:
            return 403, {"error": f"You don't have the rights to create a model under the namespace {owner}"}
        known = name in self.hub.repos
        if not known:
            self.hub.repos[name] = Repo(asked.get("visibility") == "private" or bool(asked.get("private")))
        return (409 if known else 200), {"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}

    def _info(self, token: str, body: bytes, name: str) -> tuple[int, Any]:
        if name not in self.hub.repos:
            return 404, {"error": "Repository not found"}
        repo = self.hub.repos[name]
        files = [{"rfilename": file} for file in repo.branches["main"]]
        return 200, {"id": name, "private": repo.private, "sha": "0" * 40, "siblings": files, "tags": []}

    def _tree(self, token: str, body: bytes, name: str, branch: str) -> tuple[int, Any]:
        files = self.hub.repos[name].branches[branch]
        return 200, [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()]

    def _branch(self, token: str, body: bytes, name: str, branch: str) -> tuple[int, Any]:
        branches = self.hub.repos[name].branches
        known = branch in branches
        branches.setdefault(branch, dict(branches["main"]))
        return (409 if known else 200), {"error": "Reference already exists"}

    def _yaml(self, token: str, body: bytes) -> tuple[int, Any]:
        wrong = "license: nonsense" in json.loads(body)["content"]
        errors = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}] if wrong else []
        return (400 if wrong else 200), {"errors": errors, "warnings": []}

    def _preupload(self, token: str, body: bytes, name: str, branch: str) -> tuple[int, Any]:
        def mode(path: str) -> str:
            return "lfs" if self.hub.large and path.endswith(".safetensors") else "regular"

        files = [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in json.loads(body)["files"]]
        return 200, {"files": files}

    def _batch(self, token: str, body: bytes, name: str) -> tuple[int, Any]:
        objects = json.loads(body)["objects"]
        todo = {"actions": {"upload": {"href": ""}}}
        found = [{**o, **(todo if o["oid"] not in self.hub.stored else {})} for o in objects]
        for entry in found:
            if "actions" in entry:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        return 200, {"transfer": "basic", "objects": found}

    def _commit(self, token: str, body: bytes, name: str, branch: str) -> tuple[int, Any]:
        repo = self.hub.repos[name]
        files = dict(repo.branches[branch])
        summary = ""
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                summary = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        repo.branches[branch] = files
        repo.commits.append((branch, summary))
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}


_ROUTES: tuple[tuple[str, Callable[..., tuple[int, Any]]], ...] = (
    (r"GET /api/whoami-v2", _Handler._whoami),
    (r"POST /api/repos/create", _Handler._create),
    (r"GET /api/models/([^/]+/[^/]+)", _Handler._info),
    (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)/?", _Handler._tree),
    (r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)", _Handler._branch),
    (r"POST /api/validate-yaml", _Handler._yaml),
    (r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)", _Handler._preupload),
    (r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler._batch),
    (r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)", _Handler._commit),
)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub of its own on a free port, stopped at the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
