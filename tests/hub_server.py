"""Speaks the Hugging Face Hub's protocol on 127.0.0.1: revisions, lists of files, downloads with ranges, and errors.

Repositories are in memory. A large file (`.safetensors`, `.parquet`) is named by its SHA-256 and served from another path, as the
Hub's store does. A small one is named by git's SHA-1.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".parquet", ".bin")
PAGE = 3  # files of a list that one answer holds
TOKEN = "hf_" + "s" * 34


def digest(path: str, content: bytes) -> str:
    """Returns the name of a file's content on the Hub."""
    if path.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class Hub:
    """Holds repositories, and the faults to simulate. `requests`: (method, path, range, whether it had the token)."""

    url: str = ""
    store: str = ""  # of large files: another host, which gets no token
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    limited: int = 0  # requests that are answered by 429
    failing: int = 0  # and by 503
    breaks_at: int | None = None  # bytes after which the next download's connection is closed
    failing_then: int = 0  # and requests after that which are answered by 503
    changed: dict[str, bytes] = field(default_factory=dict)  # contents that are served in place of those that are listed
    requests: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def push(self, repo: str, content: Mapping[str, bytes] | Path, kind: str = "models") -> str:
        """Commits a folder's files, or the given ones, to `main`; returns the commit."""
        if isinstance(content, Path):
            content = {p.relative_to(content).as_posix(): p.read_bytes() for p in content.rglob("*") if p.is_file()}
        names = [[path, digest(path, data)] for path, data in sorted(content.items())]
        place = f"{kind}/{repo}"
        number = len(self.commits.get(place, {}))
        commit = hashlib.sha1(json.dumps([place, number, names]).encode(), usedforsecurity=False).hexdigest()
        self.commits.setdefault(place, {})[commit] = dict(content)
        self.refs.setdefault(place, {})["main"] = commit
        return commit

    def downloads(self) -> list[str]:
        """Lists the paths of files whose bytes were requested."""
        return [path for method, path, _, _ in self.requests if method == "GET" and ("/resolve/" in path or "/store/" in path)]


@contextmanager
def serving() -> Iterator[Hub]:
    """Runs a Hub until the context ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.store = (f"http://{host}:{server.server_address[1]}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path, authorized = unquote(parts.path), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self.hub.requests.append((self.command, path, self.headers.get("Range") or "", authorized))
        if self.hub.limited > 0:
            self.hub.limited -= 1
            self._send(429, b"{}")
        elif self.hub.failing > 0:
            self.hub.failing -= 1
            self._send(503, b"{}")
        elif path.startswith("/store/"):
            self._content(path)
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), parse_qs(parts.query), authorized)
        else:
            self._resolve(path.strip("/"), authorized)

    def _rejects(self, place: str, authorized: bool, files: bool) -> bool:
        if place not in self.hub.commits or (place in self.hub.private and not authorized):
            self._send(404 if authorized else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif files and place in self.hub.gated:
            self._send(403 if authorized else 401, b"{}", {"X-Error-Code": "GatedRepo"})
        else:
            return False
        return True

    def _commit(self, place: str, revision: str) -> str | None:
        commit = self.hub.refs[place].get(revision, revision)
        if commit in self.hub.commits[place]:
            return commit
        self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        return None

    def _api(self, rest: str, query: dict[str, list[str]], authorized: bool) -> None:
        kind, org, name, *more = [*rest.split("/"), "", ""] if rest.count("/") < 2 else rest.split("/")
        place, what, revision = f"{kind}/{org}/{name}", *(more[:2] or ["revision", "main"])
        if self._rejects(place, authorized, files=False) or (commit := self._commit(place, revision)) is None:
            return
        if what != "tree":
            self._send(200, json.dumps({"id": f"{org}/{name}", "sha": commit, "siblings": []}).encode())
            return
        files = sorted(self.hub.commits[place][commit].items())
        first = int(query.get("cursor", ["0"])[0])
        page = [_listed(path, data) for path, data in files[first : first + PAGE]]
        folders = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": "folder"}] if not first else []
        more_pages = first + PAGE < len(files)
        link = f'<{self.hub.url}/api/{place}/tree/{revision}?recursive=True&cursor={first + PAGE}>; rel="next"'
        self._send(200, json.dumps(folders + page).encode(), {"Link": link} if more_pages else {})

    def _resolve(self, rest: str, authorized: bool) -> None:
        parts = rest.split("/")
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        org, name, _, revision, *path = parts
        place, file = f"{kind}/{org}/{name}", "/".join(path)
        if self._rejects(place, authorized, files=True) or (commit := self._commit(place, revision)) is None:
            return
        content = self.hub.commits[place][commit].get(file)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        named = {"X-Repo-Commit": commit, "ETag": f'"{digest(file, content)}"'}
        if not file.endswith(LARGE):
            self._send(200, self.hub.changed.get(file, content), named)
            return
        linked = {"X-Linked-Etag": named["ETag"], "X-Linked-Size": str(len(content)), "X-Repo-Commit": commit}
        self._send(302, b"", {**linked, "Location": f"{self.hub.store}/store/{place}/{commit}/{file}"})

    def _content(self, path: str) -> None:
        kind, org, name, commit, *rest = path.removeprefix("/store/").split("/")
        file = "/".join(rest)
        content = self.hub.changed.get(file, self.hub.commits[f"{kind}/{org}/{name}"][commit][file])
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        part = content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(part)))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if (breaks_at := self.hub.breaks_at) is not None:
            self.hub.breaks_at, self.hub.failing = None, self.hub.failing_then
            self.wfile.write(part[:breaks_at])
            self.close_connection = True
        else:
            self.wfile.write(part)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _listed(path: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": digest(f"{path}.txt", data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": digest(path, data), "size": len(data), "pointerSize": 130}
    return entry
