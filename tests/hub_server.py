"""A stand-in for the hub: the routes that an upload by `huggingface_hub` takes, without Xet.

Large files go by git-lfs's batch route and a PUT, others inside the commit, as on the hub. What it
holds is `repos`: of each repository and branch the files. `faults` maps a route's name to what it
answers in place of its reply: a status, or "hang".
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LARGE = (".safetensors", "tokenizer.json")
TOKEN = "hf_valid"
SHA = "0" * 40


class FakeHub:
    """Serves from a thread; `stop` ends it."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.faults: dict[str, Any] = {}
        self.ended = threading.Event()
        handler = type("Bound", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, body: Any = None, **headers: str) -> None:
        content = json.dumps({} if body is None else body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.route("POST")

    def do_GET(self) -> None:
        self.route("GET")

    def do_PUT(self) -> None:
        self.route("PUT")

    def route(self, method: str) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        tried = (
            (name, re.fullmatch(form, path)) for name, (m, form) in ROUTES.items() if m == method
        )
        name, hit = next(((name, hit) for name, hit in tried if hit), ("", None))
        if self.hub.ended.is_set():  # a connection that was kept open
            self.close_connection = True
            return None
        if hit is None:
            return self.answer(404, {"error": f"no route {method} {path}"})
        self.hub.asked.append(name)
        fault = self.hub.faults.get(name)
        if fault == "hang":
            self.hub.ended.wait(60)
            return None
        if fault:
            return self.answer(fault, {"error": "The server says no"})
        is_known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name != "put" and not is_known:
            said = "Invalid credentials in Authorization header"
            return self.answer(401, {"error": said}, X_Error_Message=said)
        return getattr(self, name)(content, *hit.groups())

    def missing(self, code: str) -> None:
        self.answer(404, {"error": code}, X_Error_Code=code)

    def info(self, _: bytes, repo: str, revision: str | None) -> None:
        branches = self.hub.repos.get(repo)
        if branches is None:
            return self.missing("RepoNotFound")
        files = branches.get((revision or "main").replace("%2F", "/"))
        if files is None:
            return self.missing("RevisionNotFound")
        card = files.get("README.md", b"").decode()
        front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        tags = yaml.safe_load(front[1]).get("tags", []) if front else []
        siblings = [{"rfilename": name} for name in sorted(files)]
        return self.answer(
            200, {"id": repo, "modelId": repo, "sha": SHA, "tags": tags, "siblings": siblings}
        )

    def create(self, content: bytes) -> None:
        asked = json.loads(content)
        repo = f"{asked['organization']}/{asked['name']}"
        if repo in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", "url": repo})
        self.hub.repos[repo] = {"main": {".gitattributes": b""}}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo)
        return self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def branch(self, _: bytes, repo: str, name: str) -> None:
        branches = self.hub.repos[repo]
        if name in branches:
            return self.answer(409, {"error": "Reference already exists"})
        branches[name] = dict(branches["main"])
        return self.answer(201)

    def validate(self, content: bytes) -> None:
        text = json.loads(content)["content"]
        front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        is_good = front is not None and isinstance(yaml.safe_load(front[1]), dict)
        errors = [] if is_good else [{"message": "no metadata"}]
        self.answer(200 if is_good else 400, {"errors": errors, "warnings": []})

    def preupload(self, content: bytes, *_: str) -> None:
        modes = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(content)["files"]
        ]
        self.answer(200, {"files": modes})

    def batch(self, content: bytes, _: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/put/{each['oid']}"}}}
            for each in json.loads(content)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, content: bytes, oid: str) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self.answer(400)
        self.hub.blobs[oid] = content
        return self.answer(200)

    def commit(self, content: bytes, repo: str, revision: str) -> None:
        files = self.hub.repos[repo].get(revision.replace("%2F", "/"))
        if files is None:
            return self.missing("RevisionNotFound")
        new = {}
        for line in content.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                new[value["path"]] = self.hub.blobs[value["oid"]]
        files.update(new)
        address = f"{self.hub.url}/{repo}/commit/{SHA}"
        return self.answer(200, {"commitUrl": address, "commitOid": SHA})


NAME = r"([^/]+/[^/]+)"
ROUTES = {
    "create": ("POST", "/api/repos/create"),
    "validate": ("POST", "/api/validate-yaml"),
    "branch": ("POST", rf"/api/models/{NAME}/branch/(.+)"),
    "preupload": ("POST", rf"/api/models/{NAME}/preupload/(.+)"),
    "commit": ("POST", rf"/api/models/{NAME}/commit/(.+)"),
    "info": ("GET", rf"/api/models/{NAME}(?:/revision/(.+))?"),
    "batch": ("POST", rf"/{NAME}\.git/info/lfs/objects/batch"),
    "put": ("PUT", r"/put/(\w+)"),
}
