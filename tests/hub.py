"""Local servers that implement the parts of the Hub's HTTP API that the tests need: for models and for a data set."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

API = "/api/datasets/someone/pictures"
COMMIT = "0" * 40


class HubHandler(BaseHTTPRequestHandler):
    """Base class of the servers: JSON and file responses."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Disable the request log."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def _json(self, value: Any) -> None:
        self._respond(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _respond(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class ModelHub(HubHandler):
    """Hub for models, in memory: repository -> path -> content. Uploads require the token "secret"."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    private: set[str] = set()  # noqa: RUF012

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(path)
        if api_match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(\w+))?", path):
            if (repository := self.repositories.get(api_match[1])) is None or api_match[2] == "nowhere":
                code = "RepoNotFound" if repository is None else "RevisionNotFound"
                return self._respond(404, b"{}", {"X-Error-Code": code})
            siblings = [{"rfilename": name} for name in repository]
            return self._json({"_id": "1", "id": api_match[1], "sha": COMMIT, "tags": [], "siblings": siblings})
        if tree_match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            sizes = {name: len(content) for name, content in self.repositories[tree_match[1]].items()}
            return self._json([{"type": "file", "path": name, "size": n, "oid": name} for name, n in sizes.items()])
        file_match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path)
        content = self.repositories.get(file_match[1], {}).get(file_match[2]) if file_match else None
        if content is not None:
            return self._respond(200, content, {"ETag": f'"{abs(hash(content)):x}"'})
        return self._respond(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlparse(self.path).path)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != "Bearer secret":
            return self._respond(401, b"{}", {})
        if path == "/api/repos/create":
            name = "/".join(filter(None, (json.loads(body).get("organization"), json.loads(body)["name"])))
            self.repositories.setdefault(name, {})
            if "private" in (json.loads(body).get("visibility"), json.loads(body).get("private") and "private"):
                self.private.add(name)
            return self._json({"url": f"http://{self.headers['Host']}/{name}"})
        owner, repository, action = path.removeprefix("/api/models/").split("/")[:3]
        name = f"{owner}/{repository}"
        if action == "preupload":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        assert action == "commit"
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.repositories[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self._json({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


class DatasetHub(HubHandler):
    """Serves the files of a folder as the data set someone/pictures, with range requests."""

    def __init__(self, folder: Path, *connection: Any) -> None:
        self.folder = folder
        super().__init__(*connection)

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if path == API or path.startswith(f"{API}/revision/"):
            self._json({"_id": "1", "id": "someone/pictures", "sha": COMMIT, "tags": [], "siblings": []})
        elif path == f"{API}/tree/{COMMIT}":
            self._json([self._entry(file) for file in sorted(self.folder.iterdir())])
        elif "/resolve/" in path and (file := self.folder / path.split("/")[-1]).is_file():
            self._file(file)
        else:
            self._respond(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _entry(self, file: Path) -> dict[str, Any]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _hash(file)}

    def _file(self, file: Path) -> None:
        content, headers = file.read_bytes(), {"ETag": f'"{_hash(file)}"', "Accept-Ranges": "bytes"}
        if byte_range := self.headers.get("Range"):
            first, last = byte_range.removeprefix("bytes=").split("-")
            stop = min(int(last or len(content)) + 1, len(content))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
            self._respond(206, content[int(first) : stop], headers)
        else:
            self._respond(200, content, headers)


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(handler: Callable[..., HubHandler]) -> Iterator[str]:
    """Serve requests on this machine; yield the URL, for example for HF_ENDPOINT."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
