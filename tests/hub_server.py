"""A server that speaks the hub's protocol as its library asks, with what goes wrong on real ones.

Files end with the name of a repository's commit; what it says of each is made of what they hold.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")  # which are kept elsewhere: a request for them is redirected
TOKEN = "hf_good"


@dataclass
class Repository:
    """Commits of a model, by their hash, each with its files; and branches and tags."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    is_gated: bool = False
    cuts: int = 0  # how many downloads of large files break in the middle
    resets: int = 0  # likewise, by a connection that is reset
    stalls: bool = False  # whether downloads of large files stand still in the middle
    states: list[int] = field(default_factory=list)  # with which the next requests are answered
    moves: dict[str, bytes] | None = None  # what is pushed once the first file was asked for

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """A new commit of a branch."""
        content = repr((len(self.commits), sorted(files.items())))
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.branches.get(revision)


@dataclass(frozen=True)
class Asked:
    """A request that came."""

    method: str
    path: str
    range: str | None
    token: str | None


class Hub:
    """Repositories behind a port of this machine; `asked` has all requests so far."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}  # repositories, for whose old names requests are redirected
        self.asked: list[Asked] = []
        self.closing = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        # the hub, and where it keeps large files
        self._servers = [_Server(("127.0.0.1", 0), handler) for _ in range(2)]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def close(self) -> None:
        self.closing.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], **settings: object) -> Repository:
        self.repositories[name] = Repository(**settings)
        self.repositories[name].push(files)
        return self.repositories[name]

    def downloaded(self, name: str) -> list[str]:
        """The files of a repository whose content was asked for, each once, in order of their names."""
        paths = {each.path for each in self.asked if each.method == "GET"}
        files = [path.partition("/resolve/")[2].partition("/")[2] for path in paths if f"/{name}/" in path]
        stored = [path.rpartition("/")[2] for path in paths if path.startswith(f"/stored/{name}/")]
        return sorted({*filter(None, files), *stored})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def blob_id(data: bytes) -> str:
    """As git names a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _described(name: str, data: bytes) -> dict[str, object]:
    large = {"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}}
    about = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
    return about | (large if name.endswith(LARGE) else {})


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Whoever was hung up on."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization")
        self.hub.asked.append(Asked(self.command, path, self.headers.get("Range"), token))
        words = path.strip("/").split("/")
        old = next((name for name in self.hub.renamed if f"/{name}/" in f"{path}/"), None)
        if old is not None:
            location = self.path.replace(old, self.hub.renamed[old])
            self._send(b"", {"Location": location}, HTTPStatus.TEMPORARY_REDIRECT)
        elif words[:2] == ["api", "models"]:
            self._api(words[2:])
        elif words[0] == "stored":
            self._stored("/".join(words[1:3]), words[3], words[4])
        elif words[2:3] == ["resolve"]:
            self._resolve("/".join(words[:2]), words[3], "/".join(words[4:]))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")

    def _opened(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """A repository and the commit of a revision; None if the request has been refused."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self._refuse(HTTPStatus.UNAUTHORIZED, "RepoNotFound")
            return None
        if repository.states:
            self._refuse(repository.states.pop(0))
            return None
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
            return None
        return repository, commit

    def _api(self, words: list[str]) -> None:
        name, revision = "/".join(words[:2]), words[3] if len(words) > 3 else "main"
        found = self._opened(name, revision)
        if found is None:
            return
        repository, commit = found
        files = repository.commits[commit]
        content = {
            "id": name,
            "sha": commit,
            "gated": "manual" if repository.is_gated else False,
            "private": False,
            "siblings": [_described(*each) for each in files.items()],
        }
        self._send(json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        found = self._opened(name, revision)
        if found is None:
            return
        repository, commit = found
        if repository.is_gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            known = self.headers.get("Authorization") is not None
            self._refuse(HTTPStatus.FORBIDDEN if known else HTTPStatus.UNAUTHORIZED, "GatedRepo")
            return
        if repository.moves is not None:
            moves, repository.moves = repository.moves, None
            repository.push(moves)
        data = repository.commits[commit].get(file)
        about = {"X-Repo-Commit": commit}
        if data is None:
            self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound", about)
        elif file.endswith(LARGE):
            stored = f"{self.hub.storage}/stored/{name}/{sha256(data)}/{file}"
            linked = {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            self._send(b"", {**about, **linked, "Location": stored}, HTTPStatus.FOUND)
        else:
            self._send(data, {**about, "ETag": f'"{blob_id(data)}"'})

    def _stored(self, name: str, digest: str, file: str) -> None:
        """A large file, from the byte on that is asked for."""
        repository = self.hub.repositories[name]
        contents = (files[file] for files in repository.commits.values() if file in files)
        data = next(content for content in contents if sha256(content) == digest)
        asked = self.headers.get("Range", "")
        start = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
        rest = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if asked else {}
        status = HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK
        if repository.cuts or repository.resets or repository.stalls:
            self._break_off(repository, data[start:], rest, status)
        else:
            self._send(data[start:], rest, status)

    def _break_off(
        self, repository: Repository, data: bytes, headers: Mapping[str, str], status: HTTPStatus
    ) -> None:
        """Send half, and then nothing, or end the connection as if all were there, or reset it."""
        self._begin(status, {**headers, "Content-Length": str(len(data))})
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if repository.stalls:
            self.hub.closing.wait()
        elif repository.cuts:
            repository.cuts -= 1
        else:
            repository.resets -= 1
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        self.close_connection = True

    def _refuse(self, status: int, code: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        told = {} if code is None else {"X-Error-Code": code, "X-Error-Message": code}
        self._send(b"", {**told, **(headers or {})}, status)

    def _send(self, content: bytes, headers: Mapping[str, str], status: int = HTTPStatus.OK) -> None:
        self._begin(status, {"Content-Length": str(len(content)), **headers})
        if self.command == "GET":
            self.wfile.write(content)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
