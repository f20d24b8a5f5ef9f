"""A stand-in for the Hugging Face Hub: its HTTP endpoints for models, as far as a download asks.

Paths and headers are those that `huggingface_hub` documents and reads: `/api/models/R/revision/V`,
`/api/models/R/tree/V`, `/R/resolve/V/FILE` with `ETag`, `X-Repo-Commit`, `X-Linked-*` and `Range`.
"""

import hashlib
import json
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LFS = 1000  # bytes from which a file is kept as a large one, by its SHA-256


@dataclass
class Hub:
    """One repository of it. `asked` are the requests for content, `(file, first byte)`.

    A file in `broken` ends after so many bytes once; one in `replaced` is sent with another
    content than is listed.
    """

    repository: str
    files: dict[str, bytes]
    commit: str = "c0ffee" + "0" * 34
    revisions: tuple[str, ...] = ("main", "v1")
    broken: dict[str, int] = field(default_factory=dict)
    replaced: dict[str, bytes] = field(default_factory=dict)
    pause: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, int]] = field(default_factory=list)
    url: str = ""

    def entry(self, path: str) -> dict[str, object]:
        """A line of the listing."""
        content = self.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if len(content) >= LFS:
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 127}
        return entry


def git_sha1(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        """Uploads: a repository is made, every file travels in the commit itself."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        own = f"/api/models/{hub.repository}/"
        if path == "/api/repos/create":
            self._json({"url": f"{hub.url}/{hub.repository}"})
        elif path == f"{own}preupload/main":
            asked = [entry["path"] for entry in json.loads(body)["files"]]
            whole = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._json({"files": [{"path": name, **whole} for name in asked]})
        elif path == f"{own}commit/main":
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                if line["key"] == "file":
                    value = line["value"]
                    hub.files[value["path"]] = b64decode(value["content"])
            hub.commit = hashlib.sha1(body).hexdigest()
            url = f"{hub.url}/{hub.repository}/commit/{hub.commit}"
            self._json({"success": True, "commitOid": hub.commit, "commitUrl": url})
        else:
            self._fail("RepoNotFound")

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        api, own = f"/api/models/{hub.repository}/", f"/{hub.repository}/resolve/"
        known = (*hub.revisions, hub.commit)
        if path == f"{api}refs":
            refs = [{"name": v, "ref": v, "targetCommit": hub.commit} for v in hub.revisions]
            self._json({"branches": refs, "tags": [], "converts": []})
        elif path.startswith(api):
            kind, _, revision = path.removeprefix(api).partition("/")
            if revision not in known:
                self._fail("RevisionNotFound")
            elif kind == "tree":
                self._json([hub.entry(name) for name in hub.files])
            else:
                self._json({"id": hub.repository, "sha": hub.commit, "siblings": []})
        elif path.startswith(own):
            revision, _, name = path.removeprefix(own).partition("/")
            if revision in known and name in hub.files:
                self._file(name, body)
            else:
                self._fail("EntryNotFound")
        else:
            self._fail("RepoNotFound")

    def _file(self, name: str, body: bool) -> None:
        hub, listed = self.hub, self.hub.files[name]
        content, start = hub.replaced.get(name, listed), 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if wanted else 200)
        large = len(listed) >= LFS
        etag = hashlib.sha256(listed).hexdigest() if large else git_sha1(listed)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        hub.asked.append((name, start))
        if (end := hub.broken.pop(name, None)) is not None:
            self.wfile.write(content[start:end])
            self.wfile.flush()
            hub.pause.wait(30)
            self.close_connection = True
            return
        self.wfile.write(content[start:])

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        for name, content in headers.items():
            self.send_header(name.replace("_", "-"), content)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _fail(self, code: str) -> None:
        self._json({"error": code}, 404, X_Error_Code=code)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port of this machine; `hub.url` is its address."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            hub.pause.set()
            server.shutdown()
            thread.join()


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server that says the same to everything, as a proxy may; yields its address."""

    class Same(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Same) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
