"""The Hugging Face Hub on this machine: what huggingface_hub asks on the wire, answered from memory.

In a test, the fixture `hub` starts one and points this process at it; `hub.environment()` points other processes at it.

    pytest_plugins = ["hub_server"]

    def test_push(hub, tmp_path):
        hub.fail("PUT", "/lfs/", status="drop", after=100_000)
        push(tmp_path, "someone/policy")
        assert hub.files("someone/policy")["config.json"] == b"{}"
        assert hub.received("PUT") < 3_000_000

It answers as the Hub does where the client can tell: who may read and write, which files go to large file storage and
which of those are there already, commits that are whole or not at all. It has one account and all types of
repositories, and knows neither Xet storage, pull requests nor organizations.
"""

import base64
import hashlib
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml

USER, TOKEN = "someone", "hf_token_of_someone"
LARGE = "*.safetensors *.bin *.pt *.pth *.onnx *.ckpt *.h5 *.npz *.npy *.parquet *.arrow *.msgpack *.zip *.tar *.mp4"
"""Names that the Hub's default .gitattributes sends to large file storage."""
LARGEST_REGULAR = 10_000_000
LICENSES = (
    "apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-nc-4.0 gpl-3.0 gemma openrail other unknown"
)
"""Some of the identifiers that a card's `license` may have."""


@dataclass(frozen=True)
class Blob:
    data: bytes = field(repr=False)
    large: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Git's hash of what git holds: the file, or the pointer to large file storage."""
        content = self.pointer if self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid

    def listed(self) -> dict:
        entry = {"type": "file", "oid": self.oid, "size": len(self.data)}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": len(self.pointer)}
        return entry


GITATTRIBUTES = Blob("".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LARGE.split()).encode())


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Repo:
    id: str
    kind: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Large files by SHA-256, committed or not."""
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict, repr=False)

    def __post_init__(self):
        self.commit({".gitattributes": GITATTRIBUTES}, "initial commit")

    def commit(self, files: Mapping[str, Blob], title: str, branch: str = "main") -> Commit:
        parent = self.branches.get(branch)
        content = [parent, title, len(self.commits), sorted((path, blob.oid) for path, blob in files.items())]
        sha = hashlib.sha1(json.dumps([self.id, *content]).encode()).hexdigest()
        commit = Commit(sha, parent, title, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"), dict(files))
        self.storage.update({blob.sha256: blob.data for blob in files.values() if blob.large})
        self.commits[sha] = commit
        self.branches[branch] = sha
        return commit

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def history(self, revision: str) -> list[Commit]:
        found = [self.at(revision)]
        while parent := found[-1].parent:
            found.append(self.commits[parent])
        return found

    @property
    def prefix(self) -> str:
        """What comes before its id in addresses that people read."""
        return "" if self.kind == "model" else f"{self.kind}s/"


@dataclass
class Request:
    method: str
    path: str
    received: int = 0
    """Bytes of its body that arrived."""
    status: int | None = None
    """None where the connection was dropped instead."""


@dataclass
class Fault:
    method: str
    path: str
    times: int
    status: int | str
    after: int


class Refusal(Exception):  # noqa: N818 (an answer)
    def __init__(self, status, code=None, message="", body=None):
        self.status, self.message, self.body = status, message, body or {"error": message}
        self.headers = ({"X-Error-Code": code} if code else {}) | ({"X-Error-Message": message} if message else {})


class Dropped(Exception):  # noqa: N818
    """The connection ends here."""


class HubServer:
    def __init__(self, *, part_size: int | None = None, page_size: int = 1000):
        """
        Args:
            part_size: large files of more bytes than this are asked for in parts of this size.
            page_size: entries of a listing that one answer holds.
        """
        self.part_size, self.page_size = part_size, page_size
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="hub")
        self.home = Path(self._folder.name).resolve() / "home"
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub, self._server.daemon_threads, self._server.block_on_close = self, True, False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        self._folder.cleanup()

    # What is on it ---------------------------------------------------------------------------------------------------

    def add_repo(self, repo_id, folder=None, *, kind="model", private=False, gated=False) -> str:
        """Makes a repository, with the folder's files as its second commit; returns the newest commit's hash."""
        repo = self.repos[kind, repo_id] = Repo(repo_id, kind, private, gated)
        if folder is None:
            return repo.branches["main"]
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return self.commit(repo_id, {str(p.relative_to(folder)): p.read_bytes() for p in paths}, kind=kind)

    def commit(self, repo_id, files: Mapping[str, bytes], *, kind="model", branch="main", message="more files") -> str:
        """Adds files in a new commit; returns its hash."""
        repo = self.repos[kind, repo_id]
        blobs = {path: Blob(data, is_large(path, len(data))) for path, data in files.items()}
        return repo.commit({**repo.at(branch).files, **blobs}, message, branch).sha

    def files(self, repo_id, revision="main", *, kind="model") -> dict[str, bytes]:
        """Contents by path, without the .gitattributes that the Hub itself puts there."""
        files = self.repos[kind, repo_id].at(revision).files
        return {path: blob.data for path, blob in files.items() if blob is not GITATTRIBUTES}

    def revisions(self, repo_id, revision="main", *, kind="model") -> list[str]:
        """Hashes of the commits of a branch, newest first; the last one is the Hub's own."""
        return [commit.sha for commit in self.repos[kind, repo_id].history(revision)]

    # What goes wrong, what was asked ---------------------------------------------------------------------------------

    def fail(self, method, path_regex, times=1, status: int | str = 500, after=0):
        """The next `times` requests whose method and path match are refused.

        Args:
            status: an HTTP status; "drop": the connection ends after `after` bytes of what is sent (of a request that
                brings nothing: of the answer); "lost": what is asked is done, and the connection ends instead of an
                answer. The client itself tries 408, 429, 500, 502, 503, 504 and lost connections up to five times more
                when it uploads, and nothing again when it commits.
        """
        self.faults.append(Fault(method, path_regex, times, status, after))

    def received(self, method="PUT", path_regex="") -> int:
        """Bytes that all requests of a kind brought so far."""
        return sum(r.received for r in self.requests if r.method == method and re.search(path_regex, r.path))

    def environment(self) -> dict[str, str]:
        """Points another process at this Hub; `RepoCard.validate` alone goes on asking the real one."""
        here = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": str(self.home), "HF_HUB_OFFLINE": "0"}
        here |= {"HF_HUB_CACHE": str(self.home / "hub"), "HF_LEROBOT_HOME": str(self.home / "lerobot")}
        here |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_DATASETS_OFFLINE": "0"}
        return here | {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "TRANSFORMERS_OFFLINE": "0"}

    def fault_for(self, method, path) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


def is_large(path, size) -> bool:
    return size > LARGEST_REGULAR or any(fnmatch(path, name) for name in LARGE.split())


def card_metadata(text: str) -> tuple[dict, list[str]]:
    """The head of a README.md, and what the Hub finds wrong with it (the likeliest of its rules)."""
    head = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n?---\s*(\n|$)", text, flags=re.DOTALL)
    try:
        data = (yaml.safe_load(head[1]) if head else {}) or {}
    except yaml.YAMLError as error:
        return {}, [f"bad indentation or value: {error}"]
    if not isinstance(data, dict):
        return {}, ["metadata must be a mapping"]
    errors = []
    if (given := data.get("license")) is not None and given not in LICENSES.split():
        errors.append(f'"license" must be one of [{LICENSES.replace(" ", ", ")}]')
    for key in ("tags", "datasets", "base_model"):
        values = data.get(key) or []
        values = [values] if isinstance(values, str) and key != "tags" else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be an array of strings')
        elif key != "tags":
            bad = [value for value in values if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value)]
            errors += [f'"{key}" with value "{value}" is not valid: use a repository id' for value in bad]
    for key in ("library_name", "pipeline_tag"):
        if not isinstance(data.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    return data, errors


# The wire ------------------------------------------------------------------------------------------------------------

API = r"/api/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>dataset|space)s/)?(?P<repo>[^/]+/[^/]+?)"
ROUTES = []


def route(method, pattern):
    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        self.hub = self.server.hub
        self.request_seen = Request(self.command, self.path)
        self.hub.requests.append(self.request_seen)
        self.fault = self.hub.fault_for(self.command, self.path)
        try:
            try:
                self.body = self.read_body()
                if self.fault and isinstance(self.fault.status, int):
                    raise Refusal(self.fault.status, message="refused by the test")  # noqa: TRY301
                self.dispatch()
            except Refusal as refusal:
                self.send(refusal.body, refusal.status, refusal.headers)
        except (Dropped, ConnectionError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 (the base class's names)

    def dispatch(self):
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, function in ROUTES:
            if wanted == method and (match := pattern.fullmatch(address.path)):
                arguments = {name: unquote(text) for name, text in match.groupdict().items() if text}
                with self.hub.lock:
                    answer = function(self, **arguments)
                return self.send(*answer) if isinstance(answer, tuple) else self.send(answer)
        raise Refusal(404, message=f"{self.command} {address.path} is not served here")

    def read_body(self) -> bytes:
        """What the request brings, counted as it comes."""
        found = bytearray()
        drop = self.fault if self.fault and self.fault.status == "drop" and self.command in ("PUT", "POST") else None
        for block in self.blocks():
            found += block
            self.request_seen.received += len(block)
            if drop and self.request_seen.received >= drop.after:
                break
        if drop:
            raise Dropped
        return bytes(found)

    def blocks(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            block = self.rfile.read(min(left, 1 << 14))
            if not block:
                raise Dropped
            left -= len(block)
            yield block

    def send(self, body, status=200, headers=None):
        if self.fault and self.fault.status == "lost":
            raise Dropped
        headers = {"Content-Type": "application/json"} | (headers or {})
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.request_seen.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        dropped = self.fault is not None and self.fault.status == "drop"
        self.wfile.write(body[: self.fault.after] if dropped else body)
        if dropped:
            raise Dropped

    def log_message(self, *arguments):
        pass

    # Who asks --------------------------------------------------------------------------------------------------------

    @property
    def user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is not None and given != f"Bearer {TOKEN}":
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return given and USER

    def repo(self, kind, repo, *, write=False, contents=False) -> Repo:
        user = self.user
        found, own = self.hub.repos.get((kind, repo)), repo.split("/")[0] == user
        if found is None or (found.private and not own):
            wrong = (404, "Repository not found") if user else (401, "Invalid username or password.")
            raise Refusal(wrong[0], "RepoNotFound", wrong[1])
        if write and not own:
            if user is None:
                raise Refusal(401, "RepoNotFound", "Invalid username or password.")
            raise Refusal(403, message="Forbidden: pass a token with write access to this repository")
        if contents and found.gated and not own:
            raise Refusal(403 if user else 401, "GatedRepo", f"Access to {kind} {repo} is restricted.")
        return found

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "id": "1", "name": USER, "fullname": USER, "orgs": [], "auth": access}

    # Repositories ----------------------------------------------------------------------------------------------------

    def own_repo(self):
        """(kind, id) of the repository that the body names."""
        if self.user is None:
            raise Refusal(401, message="Invalid username or password.")
        asked = json.loads(self.body)
        namespace = asked.get("organization") or USER
        if namespace != USER:
            raise Refusal(403, message=f"You don't have the rights to this under the namespace {namespace!r}")
        return asked, (asked.get("type") or "model", f"{namespace}/{asked['name']}")

    @route("POST", "/api/repos/create")
    def create_repo(self):
        asked, (kind, name) = self.own_repo()
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repos:
            message = f"You already created this {kind} repo: {name}"
            raise Refusal(409, message=message, body={"error": message, "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.add_repo(name, kind=kind, private=private)
        return {"url": url, "name": name, "id": "1"}

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self):
        _, key = self.own_repo()
        if self.hub.repos.pop(key, None) is None:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        return {}

    @route("PUT", f"{API}/settings")
    def settings(self, kind, repo):
        found, asked = self.repo(kind, repo, write=True), json.loads(self.body)
        found.private = asked["visibility"] == "private" if "visibility" in asked else found.private
        found.gated = bool(asked.get("gated", found.gated))
        return {"private": found.private, "gated": found.gated}

    @route("GET", f"{API}/auth-check(?P<write>/write)?")
    def auth_check(self, kind, repo, write=None):
        self.repo(kind, repo, write=write is not None, contents=True)
        return {}

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        data, errors = card_metadata(json.loads(self.body)["content"])
        warnings = [] if data or errors else ["empty or missing yaml metadata in repo card"]
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return answer, 400 if errors else 200

    # Reading ---------------------------------------------------------------------------------------------------------

    @route("GET", f"{API}(?:/revision/(?P<revision>[^/]+))?")
    def info(self, kind, repo, revision="main"):
        found = self.repo(kind, repo)
        commit = found.at(revision)
        card, _ = card_metadata(commit.files["README.md"].data.decode()) if "README.md" in commit.files else ({}, [])
        siblings = [{"rfilename": path} for path in commit.files]
        if "blobs" in self.query:
            for sibling, blob in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": len(blob.data), "blobId": blob.oid}
                if blob.large:
                    size = len(blob.data)
                    sibling["lfs"] = {"sha256": blob.sha256, "size": size, "pointerSize": len(blob.pointer)}
        common = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.sha, "disabled": False}
        common |= {"private": found.private, "gated": "manual" if found.gated else False, "downloads": 0, "likes": 0}
        common |= {"createdAt": found.history("main")[-1].date, "lastModified": commit.date, "siblings": siblings}
        common |= {"tags": card.get("tags", []), "cardData": card, "library_name": card.get("library_name")}
        return common | {"pipeline_tag": card.get("pipeline_tag"), "usedStorage": sum(map(len, found.storage.values()))}

    def entry(self, commit, path) -> dict | None:
        """A file or folder as listings show it."""
        last = {"lastCommit": {"id": commit.sha, "title": commit.title, "date": commit.date}}
        extra = last if self.query.get("expand", ["false"])[0].lower() == "true" else {}
        if path in commit.files:
            return {"path": path, **commit.files[path].listed(), **extra}
        inside = [(p, b.oid) for p, b in commit.files.items() if p.startswith(f"{path}/")]
        oid = hashlib.sha1(repr(inside).encode()).hexdigest()
        return {"type": "directory", "path": path, "oid": oid, "size": 0, **extra} if inside else None

    @route("GET", f"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, kind, repo, revision, path=""):
        commit = self.repo(kind, repo).at(revision)
        base = f"{path.strip('/')}/" if path else ""
        names = {p[len(base) :] for p in commit.files if p.startswith(base)}
        if not names:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        names |= {"/".join(n.split("/")[: i + 1]) for n in names for i in range(n.count("/"))}
        if self.query.get("recursive", ["false"])[0].lower() != "true":
            names = {name for name in names if "/" not in name}
        names, start = sorted(names), int(self.query.get("cursor", ["0"])[0])
        end = start + self.hub.page_size
        here, _, query = self.path.partition("?")
        query = "&".join([part for part in query.split("&") if part and not part.startswith("cursor=")])
        link = {"Link": f'<{self.hub.url}{here}?{query}&cursor={end}>; rel="next"'} if end < len(names) else {}
        return [self.entry(commit, base + name) for name in names[start:end]], 200, link

    @route("POST", f"{API}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, kind, repo, revision):
        commit = self.repo(kind, repo).at(revision)
        self.query = asked = parse_qs(self.body.decode())
        entries = [self.entry(commit, path.strip("/")) for path in asked.get("paths", [])]
        return [entry for entry in entries if entry]

    @route("GET", f"{API}/commits/(?P<revision>[^/]+)")
    def commits(self, kind, repo, revision):
        authors = [{"user": USER}]
        return [
            {"id": c.sha, "title": c.title, "message": "", "date": c.date, "authors": authors}
            for c in self.repo(kind, repo).history(revision)
        ]

    @route("GET", f"{PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path, kind="model"):
        commit = self.repo(kind, repo, contents=True).at(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if path not in commit.files:
            refusal = Refusal(404, "EntryNotFound", "Entry not found")
            refusal.headers |= headers
            raise refusal
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.etag}"'
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": len(blob.data)}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked or asked[0] == "bytes=-":
            return blob.data, 200, headers
        size = len(blob.data)
        first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if first > last:
            return b"", 416, headers | {"Content-Range": f"bytes */{size}"}
        return blob.data[first : last + 1], 206, headers | {"Content-Range": f"bytes {first}-{last}/{size}"}

    # Branches and tags -----------------------------------------------------------------------------------------------

    @route("GET", f"{API}/refs")
    def refs(self, kind, repo):
        found = self.repo(kind, repo)
        listed = {"branches": ("heads", found.branches), "tags": ("tags", found.tags)}
        return {"converts": [], "pullRequests": []} | {
            key: [{"name": name, "ref": f"refs/{place}/{name}", "targetCommit": sha} for name, sha in refs.items()]
            for key, (place, refs) in listed.items()
        }

    @route("POST", f"{API}/(?P<what>branch|tag)/(?P<name>[^/]+)")
    def create_ref(self, kind, repo, what, name):
        found, asked = self.repo(kind, repo, write=True), json.loads(self.body or b"{}")
        refs = found.branches if what == "branch" else found.tags
        start, name = (asked.get("startingPoint", "main"), name) if what == "branch" else (name, asked["tag"])
        if name in refs:
            raise Refusal(409, message=f"Reference already exists: {name}")
        refs[name] = found.at(start).sha
        return {}

    @route("DELETE", f"{API}/(?P<what>branch|tag)/(?P<name>[^/]+)")
    def delete_ref(self, kind, repo, what, name):
        found = self.repo(kind, repo, write=True)
        if (found.branches if what == "branch" else found.tags).pop(name, None) is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {name}")
        return {}

    # Writing ---------------------------------------------------------------------------------------------------------

    @route("POST", f"{API}/preupload/(?P<revision>[^/]+)")
    def preupload(self, kind, repo, revision):
        there = self.repo(kind, repo, write=True).at(revision).files
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
                    "shouldIgnore": False,
                    **({"oid": there[file["path"]].etag} if file["path"] in there else {}),
                }
                for file in json.loads(self.body)["files"]
            ]
        }

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/batch")
    def batch(self, repo, kind="model"):
        found, asked = self.repo(kind, repo, write=True), json.loads(self.body)
        objects = [{"oid": o["oid"], "size": o["size"]} for o in asked["objects"]]
        for wanted in objects:
            if wanted["oid"] not in found.storage:
                wanted["actions"] = self.actions(found, wanted["oid"], wanted["size"])
        return {"transfer": "basic" if "basic" in asked["transfers"] else "multipart", "objects": objects}

    def actions(self, repo, oid, size):
        there, part = f"{self.hub.url}/lfs/{repo.kind}s/{repo.id}/{oid}", self.hub.part_size
        verify = {"href": f"{self.hub.url}/{repo.prefix}{repo.id}.git/info/lfs/objects/verify"}
        if part is None or size <= part:
            return {"upload": {"href": there}, "verify": verify}
        parts = {str(n + 1): f"{there}/{n + 1}" for n in range(-(-size // part))}
        return {"upload": {"href": f"{there}/complete", "header": {"chunk_size": str(part), **parts}}, "verify": verify}

    STORE = r"/lfs/(?P<kind>model|dataset|space)s/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"

    @route("PUT", STORE)
    def upload(self, kind, repo, oid):
        return self.store(self.hub.repos[kind, repo], oid, self.body)

    @route("PUT", rf"{STORE}/(?P<number>\d+)")
    def upload_part(self, kind, repo, oid, number):
        self.hub.repos[kind, repo].parts[oid, int(number)] = self.body
        return {}, 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    @route("POST", f"{STORE}/complete")
    def complete(self, kind, repo, oid):
        found = self.hub.repos[kind, repo]
        parts = [found.parts.get((oid, p["partNumber"]), b"") for p in json.loads(self.body)["parts"]]
        return self.store(found, oid, b"".join(parts))

    def store(self, repo, oid, data):
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400, message=f"what came is not {oid}")
        repo.storage[oid] = data
        return {}

    @route("POST", rf"{PAGE}\.git/info/lfs/objects/verify")
    def verify(self, repo, kind="model"):
        found, asked = self.repo(kind, repo, write=True), json.loads(self.body)
        if len(found.storage.get(asked["oid"], b"")) != asked["size"]:
            raise Refusal(404, message="Object not found")
        return {}

    @route("POST", f"{API}/commit/(?P<revision>[^/]+)")
    def create_commit(self, kind, repo, revision):
        if "create_pr" in self.query:
            raise Refusal(400, message="pull requests are not served here")
        found = self.repo(kind, repo, write=True)
        before = found.at(revision)
        if revision not in found.branches:
            raise Refusal(400, message=f"{revision} is not a branch")
        items = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = items[0]["value"]
        if not before.sha.startswith(header.get("parentCommit", "")):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for item in items[1:]:
            self.change(found, files, item["key"], item["value"])
        commit = found.commit(files, header["summary"], revision)
        url = f"{self.hub.url}/{found.prefix}{repo}/commit/{commit.sha}"
        return {"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""}

    def change(self, repo, files, key, value):
        """Makes one change of a commit."""
        path = value["path"].strip("/")
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]))
            if path == "README.md" and (errors := card_metadata(files[path].data.decode())[1]):
                raise Refusal(400, message="; ".join(errors))
        elif key == "lfsFile":
            if value["oid"] not in repo.storage:
                raise Refusal(400, message=f"LFS pointer pointed to a file that does not exist: {path}")
            files[path] = Blob(repo.storage[value["oid"]], large=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")
        elif key == "deletedFolder":
            for inside in [p for p in files if p.startswith(f"{path}/")]:
                del files[inside]
        else:
            raise Refusal(400, message=f"unknown change {key!r}")


# Clients in this process ---------------------------------------------------------------------------------------------

COPIES = ("huggingface_hub", "lerobot", "transformers", "peft", "datasets", "accelerate")
"""Packages that keep copies of the Hub's address and folders in variables of their own."""


@contextmanager
def connected(server: HubServer):
    """Within it, whatever huggingface_hub asks in this process goes to the server; it tries again without waiting."""
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http

    for module in ("lerobot.utils.constants", "datasets.config", "transformers.utils.hub"):
        import_module(module)  # first imported within, they would remember the server for good
    home = server.home
    values = {"ENDPOINT": server.url, "HF_ENDPOINT": server.url, "HF_HOME": str(home)}
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    values["HF_URL_HOSTS"] = constants.HF_URL_HOSTS | {"127.0.0.1"}
    values |= dict.fromkeys(["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"], str(home / "hub"))
    values |= {"HF_ASSETS_CACHE": str(home / "assets"), "HF_XET_CACHE": str(home / "xet")}
    values |= {"HF_TOKEN_PATH": str(home / "token"), "HF_STORED_TOKENS_PATH": str(home / "stored_tokens")}
    values |= {"HF_LEROBOT_HOME": home / "lerobot", "HF_LEROBOT_HUB_CACHE": home / "lerobot/hub"}
    values |= {"HF_HUB_OFFLINE": False, "HF_DATASETS_OFFLINE": False}
    values |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}

    def to_server(request):
        address = urlsplit(server.url)
        request.url = request.url.copy_with(scheme="http", host=address.hostname, port=address.port)

    def client():
        made = _http.default_client_factory()
        made.event_hooks["request"].append(to_server)  # some addresses are written out in huggingface_hub's code
        return made

    before = {name: getattr(module, name) for module, name in holders(values.keys())}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        for module, name in holders(values.keys()):
            patch.setattr(module, name, values[name])
        patch.setattr(hf_api.api, "endpoint", server.url)
        patch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", client)
        for module in (_http, file_download):
            patch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
        _http.close_session()
        yield server
        _http.close_session()
    for module, name in holders(values.keys()):  # modules that were first imported within have copied what they found
        if getattr(module, name) == values[name]:
            setattr(module, name, before[name])


def holders(names):
    """(module, name) of every copy that there is of such a variable."""
    modules = [module for name, module in sys.modules.items() if module and name.split(".")[0] in COPIES]
    return [(module, name) for module in modules for name in names & vars(module).keys()]


@pytest.fixture
def hub():
    """An empty Hub, which this process talks to with a cache that is empty too."""
    with HubServer() as server, connected(server):
        yield server
