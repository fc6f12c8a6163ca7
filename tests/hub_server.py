"""A Hub for tests: repositories served over HTTP on 127.0.0.1, with faults on order.

    with HubServer() as hub:
        hub.repositories["owner/name"] = {"v1": {"model.safetensors": content}}
        hub.order(cut(after=1000), method="GET", times=1)
        hf_hub_download("owner/name", "model.safetensors", revision="v1", endpoint=hub.url)
        assert hub.requests[-1].headers["Range"] == "bytes=1000-"

It knows what huggingface_hub asks for

- to download a file: `HEAD` and `GET` of `/{owner}/{name}/resolve/{revision}/{path}`;
- to upload files: `POST` of `/api/repos/create`, `/api/validate-yaml` and, below
  `/api/models/{owner}/{name}`, `/preupload/{revision}`, `/commit/{revision}`, `/tag/{revision}`;
  for large files also `POST` of `/{owner}/{name}.git/info/lfs/objects/batch` and `PUT` of each
  (the client has to have HF_HUB_DISABLE_XET);
- to look at a repository: `GET` of `/api/models/{owner}/{name}[/revision/{revision}]`;
- to read a dataset, the repository `datasets/{owner}/{name}`: the same, `GET` of
  `/api/datasets/{owner}/{name}/tree/{revision}` and `POST` of `.../paths-info/{revision}`.

It needs nothing but the standard library.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote

Files = dict[str, bytes]

_RESOLVE = re.compile(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LOOK = re.compile(r"/api/(?:models/)?((?:datasets/)?[^/]+/[^/]+)(?:/revision/([^/]+))?()")
_LIST = re.compile(r"/api/(datasets/[^/]+/[^/]+)/(tree|paths-info)/([^/?]+)/?([^?]*)(?:\?.*)?")
_UPLOAD = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit|tag)/([^/]+)")
_BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/(batch)()")


@dataclass
class Request:
    """What a client asked for; the names of headers are in title case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Answer:
    """What the client is about to get; a fault is a function that changes it.

    Attributes:
        cut_after: The connection ends after so many bytes of the body, whatever was promised.
        pieces: The body is sent in so many pieces, `before_piece` being called before each.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut_after: int | None = None
    pieces: int = 1
    before_piece: Callable[[], object] | None = None


Fault = Callable[[Answer], None]


def error(status: int, **headers: str) -> Fault:
    """Answer with an error; `X_Error_Code="RepoNotFound"` becomes the header `X-Error-Code`."""

    def fault(answer: Answer) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        answer.status, answer.headers = status, {"X-Request-Id": "Root=1-2-3", **named}
        answer.body = json.dumps({"error": HTTPStatus(status).phrase}).encode()

    return fault


def redirect(location: str) -> Fault:
    """Send the client elsewhere: to a path of this server or to a whole URL."""

    def fault(answer: Answer) -> None:
        answer.status, answer.body = 302, b""
        answer.headers["Location"] = location

    return fault


def headers(**changes: str | None) -> Fault:
    """Change headers, or leave out those that are None; `_` in a name stands for `-`."""

    def fault(answer: Answer) -> None:
        for name, value in changes.items():
            answer.headers.pop(name.replace("_", "-"), None)
            if value is not None:
                answer.headers[name.replace("_", "-")] = value

    return fault


def other_body(change: Callable[[bytes], bytes]) -> Fault:
    """Send other bytes, in good order."""
    return lambda answer: setattr(answer, "body", change(answer.body))


def cut(after: int) -> Fault:
    """End the connection after so many bytes of the body."""
    return lambda answer: setattr(answer, "cut_after", after)


def drip(pieces: int, before_piece: Callable[[], object]) -> Fault:
    """Send the body in pieces and call a function, which may take its time, before each."""

    def fault(answer: Answer) -> None:
        answer.pieces, answer.before_piece = pieces, before_piece

    return fault


def ordered(
    fault: Fault, method: str | None = None, times: float = float("inf")
) -> Callable[[HubServer, object], None]:
    """Give an arrangement of a test that orders a fault, see `HubServer.order`."""
    return lambda hub, monkeypatch: hub.order(fault, method, times)


class HubServer(ThreadingHTTPServer):
    """Repositories, who may read them, what was asked, and what is to go wrong.

    Attributes:
        repositories: Contents by repository, revision and path.
        private: Repositories that only a holder of a token may read.
        tokens: The tokens that are accepted; who has one may read and write all.
        lfs_suffixes: Which files are uploaded as large ones; the others come with the commit.
        large_files: Contents of large files by SHA-256, from before the commit that names them.
        requests: All that was asked, in order.
    """

    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, Files]] = {}
        self.private: set[str] = set()
        self.tokens: set[str] = set()
        self.lfs_suffixes: tuple[str, ...] = ()
        self.large_files: Files = {}
        self.requests: list[Request] = []
        self._orders: list[tuple[Fault, str | None, float]] = []
        self._lock = threading.Lock()

    def order(self, fault: Fault, method: str | None = None, times: float = float("inf")) -> None:
        """Let the next requests go wrong.

        Args:
            method: `GET`, `HEAD`, `POST` or `PUT`; all by default.
            times: How many of them; all by default.
        """
        self._orders.append((fault, method, times))

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def answer(self, request: Request) -> Answer:
        """Make the answer to a request, the ordered faults included."""
        answer = Answer()
        with self._lock:
            self.requests.append(request)
            self._look_up(request, answer)
            remaining = []
            for fault, method, times in self._orders:
                if method in (None, request.method):
                    fault(answer)
                    times -= 1
                if times > 0:
                    remaining.append((fault, method, times))
            self._orders = remaining
        return answer

    def _look_up(self, request: Request, answer: Answer) -> None:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            return error(401, X_Error_Message="Invalid credentials in Authorization header")(answer)
        if request.path == "/":
            return
        if listed := _LIST.fullmatch(request.path):
            return self._list(request, answer, *map(unquote, listed.groups()))
        if request.method in ("POST", "PUT"):
            return self._take(request, answer, token)
        look = _LOOK.fullmatch(request.path)
        asked = look or _RESOLVE.fullmatch(request.path)
        repository, revision, path = map(unquote, asked.groups("main")) if asked else ("", "", "")
        if repository not in self.repositories or (repository in self.private and not token):
            # Like the Hub, tell nobody without a token whether a private repository exists.
            return error(404 if token else 401, X_Error_Code="RepoNotFound")(answer)
        files = self._find_files(repository, revision)
        if files is None:
            return error(404, X_Error_Code="RevisionNotFound")(answer)
        if look:
            private = repository in self.private
            return reply(answer, {"id": repository, "sha": commit_of(files), "private": private})
        if path not in files:
            return error(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit_of(files))(answer)
        answer.body = files[path]
        answer.headers = {
            "ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"',
            "X-Repo-Commit": commit_of(files),
            "Accept-Ranges": "bytes",
        }
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if wanted:
            first, size = int(wanted[1]), len(answer.body)
            if first >= size:
                return error(416, Content_Range=f"bytes */{size}")(answer)
            answer.status, answer.body = 206, answer.body[first:]
            answer.headers["Content-Range"] = f"bytes {first}-{size - 1}/{size}"

    def _list(
        self, request: Request, answer: Answer, repository: str, how: str, revision: str, path: str
    ) -> None:
        """Describe files and folders of a dataset: those in a folder, or those that are asked."""
        files = self._find_files(repository, revision) if repository in self.repositories else None
        if files is None:
            return error(404, X_Error_Code="RepoNotFound")(answer)
        folders = {str(parent) for file in files for parent in PurePosixPath(file).parents} - {"."}
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": commit_of({name: content})}
            for name, content in files.items()
        ] + [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
        asked = parse_qs(request.body.decode()).get("paths", [])
        if how == "tree":
            whole, folder = "recursive=True" in request.path, PurePosixPath(path)
            asked = [
                e["path"] for e in entries if whole or PurePosixPath(e["path"]).parent == folder
            ]
        reply(answer, [entry for entry in entries if entry["path"] in asked])

    def _find_files(self, repository: str, revision: str) -> Files | None:
        revisions = self.repositories[repository]
        commits = {commit_of(files): files for files in revisions.values()}
        return {**revisions, **commits}.get(revision)

    def _take(self, request: Request, answer: Answer, token: str) -> None:
        """Answer the requests by which a client uploads."""
        if request.method == "PUT":  # to storage, which is not asked for a token
            self.large_files[hashlib.sha256(request.body).hexdigest()] = request.body
            return
        if not token:
            return error(401)(answer)
        sent = [json.loads(line) for line in request.body.splitlines()]
        if request.path == "/api/validate-yaml":
            return reply(answer, {})
        if request.path == "/api/repos/create":
            repository = f"{sent[0]['organization']}/{sent[0]['name']}"
            if repository in self.repositories:
                answer.status = 409
            else:
                self.repositories[repository] = {"main": {}}
                if sent[0].get("visibility") == "private":
                    self.private.add(repository)
            return reply(answer, {"url": f"{self.url}/{repository}"})
        asked = _UPLOAD.fullmatch(request.path) or _BATCH.fullmatch(request.path)
        repository, action, revision = map(unquote, asked.groups()) if asked else ("", "", "")
        if repository not in self.repositories:
            error(404, X_Error_Code="RepoNotFound")(answer)
        elif action == "preupload":
            files = self._find_files(repository, revision) or {}
            reply(
                answer, {"files": [self._judge(file["path"], files) for file in sent[0]["files"]]}
            )
        elif action == "batch":
            reply(answer, {"objects": [self._offer(large) for large in sent[0]["objects"]]})
        elif action == "commit":
            files = self._commit(sent, self._find_files(repository, revision) or {})
            self.repositories[repository][revision] = files
            url = f"{self.url}/{repository}/commit/{commit_of(files)}"
            reply(answer, {"commitUrl": url, "commitOid": commit_of(files)})
        elif not re.fullmatch(r"[\w.-]+", sent[0]["tag"]):
            error(400, X_Error_Message="Invalid tag name")(answer)
        elif sent[0]["tag"] in self.repositories[repository]:
            error(409)(answer)
        else:
            files = self._find_files(repository, revision) or {}
            self.repositories[repository][sent[0]["tag"]] = files

    def _judge(self, path: str, files: Files) -> dict[str, object]:
        """Say how a file is to be uploaded, and what is there of it."""
        is_large = path.endswith(self.lfs_suffixes)
        there = None
        if path in files:
            content = files[path]
            git_blob = b"blob %d\0" % len(content) + content
            there = (hashlib.sha256(content) if is_large else hashlib.sha1(git_blob)).hexdigest()
        mode = "lfs" if is_large else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": there}

    def _offer(self, large: dict[str, object]) -> dict[str, object]:
        """Say where to put a large file, unless it is there."""
        if large["oid"] in self.large_files:
            return large
        return {**large, "actions": {"upload": {"href": f"{self.url}/storage/{large['oid']}"}}}

    def _commit(self, lines: list[dict], files: Files) -> Files:
        files = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large_files[value["oid"]]
        return files


def reply(answer: Answer, content: object) -> None:
    """Answer with JSON."""
    answer.headers["Content-Type"] = "application/json"
    answer.body = json.dumps(content).encode()


def commit_of(files: Files) -> str:
    """Name the commit that these files make: 40 hexadecimal digits."""
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        headers = {name.title(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, headers, body)
        answer = self.server.answer(request)
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self._send(answer)

    do_HEAD = do_POST = do_PUT = do_GET

    def _send(self, answer: Answer) -> None:
        body = answer.body[: answer.cut_after]
        step = max(1, -(-len(body) // answer.pieces))
        try:
            for start in range(0, len(body), step):
                if answer.before_piece is not None:
                    answer.before_piece()
                self.wfile.write(body[start : start + step])
        except ConnectionError:  # the client has gone
            self.close_connection = True
        if answer.cut_after is not None:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
