"""A little Hugging Face and a little ModelScope on this machine, over real HTTP, that can be made to fail."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/datasets/([^/]+/[^/]+)/revision/main")
FILE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
TREE = re.compile(r"/api/v1/datasets/([^/]+/[^/]+)/repo/tree")
REPO = re.compile(r"/api/v1/datasets/([^/]+/[^/]+)/repo")
STORED = re.compile(r"/stored/([^/]+/[^/]+)/(.+)")  # where a redirect leads


class Seen(NamedTuple):
    """A request: the path in the data set ("" for a listing), the range asked for, the bytes sent, who asked."""

    path: str
    range: str
    sent: int
    secrets: dict[str, str]


@dataclass
class MiniHub:
    """files: data set -> path -> bytes. The rest are switches.

    token       : to be shown by whoever asks, if any.
    elsewhere   : where files are sent from, by a redirect there.
    ranges      : whether ranges are understood.
    failing     : so many requests for files that begin now are answered with `status`.
    breaking    : so many answers break off after `after` bytes.
    """

    files: dict[str, dict[str, bytes]]
    token: str = ""
    elsewhere: str = ""
    ranges: bool = True
    failing: int = 0
    status: int = 503
    breaking: int = 0
    after: int = 1000
    tags: bool = True
    seen: list[Seen] = field(default_factory=list)
    url: str = ""

    def revision(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[name].items())).encode()).hexdigest()

    def sent(self, suffix: str = "") -> int:
        """Bytes of files that were sent."""
        return sum(one.sent for one in self.seen if one.path and one.path.endswith(suffix))

    def requests(self, suffix: str = "") -> int:
        return sum(bool(one.path) and one.path.endswith(suffix) for one in self.seen)

    @contextmanager
    def serve(self) -> Iterator[MiniHub]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: MiniHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        place, query = unquote(parts.path), {key: values[0] for key, values in parse_qs(parts.query).items()}
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._note("", 401)
        if found := API.fullmatch(place):
            return self._list_hf(found[1])
        if found := FILE.fullmatch(place):
            known = found[1] in self.hub.files and found[2] == self.hub.revision(found[1])
            return self._file(found[1], found[3]) if known else self._note(found[3], 404)
        if found := TREE.fullmatch(place):
            return self._list_ms(found[1], int(query["PageNumber"]), int(query["PageSize"]))
        if found := REPO.fullmatch(place):
            return self._file(found[1], query["FilePath"])
        if found := STORED.fullmatch(place):
            return self._content(found[1], found[2])
        return self._note("", 404)

    def _note(self, path: str, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        secrets = {name: self.headers[name] for name in ("Authorization", "Cookie") if name in self.headers}
        cut = len(body)
        if path and body and self.hub.breaking:
            self.hub.breaking, cut = self.hub.breaking - 1, min(self.hub.after, len(body))
        self.hub.seen.append(Seen(path, self.headers.get("Range", ""), cut, secrets))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[:cut])

    def _list_hf(self, name: str) -> None:
        if name not in self.hub.files:
            return self._note("", 404)
        siblings = [
            {"rfilename": path, "size": len(body), "blobId": git_id(body)}
            | ({"lfs": {"sha256": sha256(body), "size": len(body)}} if path.endswith(".parquet") else {})
            for path, body in self.hub.files[name].items()
        ]
        return self._note("", 200, json.dumps({"sha": self.hub.revision(name), "siblings": siblings}).encode())

    def _list_ms(self, name: str, page: int, size: int) -> None:
        if name not in self.hub.files:
            return self._note("", 200, b'{"Code": 404, "Success": false, "Message": "no such data set"}')
        entries = [{"Path": "folder", "Type": "tree", "Size": 0}] + [
            {"Path": path, "Name": path.rpartition("/")[2], "Type": "blob", "Size": len(body), "Sha256": sha256(body)}
            for path, body in self.hub.files[name].items()
        ]
        files = entries[(page - 1) * size : page * size]
        return self._note("", 200, json.dumps({"Code": 200, "Data": {"Files": files}}).encode())

    def _file(self, name: str, path: str) -> None:
        if self.hub.failing:
            self.hub.failing -= 1
            return self._note(path, self.hub.status)
        if self.hub.elsewhere:
            return self._note(path, 302, headers={"Location": f"{self.hub.elsewhere}/stored/{name}/{path}"})
        return self._content(name, path)

    def _content(self, name: str, path: str) -> None:
        if path not in self.hub.files.get(name, {}):
            return self._note(path, 404)
        body = self.hub.files[name][path]
        tag = {"ETag": f'"{sha256(body) if path.endswith(".parquet") else git_id(body)}"'} if self.hub.tags else {}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not self.hub.ranges:
            return self._note(path, 200, body, tag)
        start, stop = int(asked[1]), min(int(asked[2]) + 1, len(body))
        if start >= len(body):
            return self._note(path, 416)
        return self._note(
            path, 206, body[start:stop], {**tag, "Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
        )
