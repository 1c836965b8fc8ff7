"""A Hub on loopback: what the libraries ask of the real one, for repositories in a folder.

It keeps commits, large files (by LFS, or by Xet in hf_xet's own local store), tokens with roles and
private repositories, and it fails when it is told to.
"""

import hashlib
import json
import re
import shutil
import socket
import threading
import time
from base64 import b64decode
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import close_session, constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of repositories that were there first
KINDS = ("models", "datasets", "spaces")
LARGE = (".safetensors", ".bin", ".arrow", ".parquet")


class Handler(BaseHTTPRequestHandler):
    """Serves root/models/USER/NAME and root/datasets/USER/NAME; root/commits/SHA is a repository at
    a commit.

    tokens: role of each: "read", "write" (everywhere), or the one namespace that it may write to.
    faults: [method, pattern of the path, what]; each happens once: a status, "cut" before anything
    is done, "lost" after it was done, before the answer, or "spoil": a file of a commit gets
    another content.
    """

    root: Path
    address: str
    requests: list[str]
    tokens: dict[str, str]
    private: set[Path]
    heads: dict[Path, list[str]]
    faults: list[list]
    commit = COMMIT

    def do_HEAD(self):
        self._handle(self._get)

    def do_GET(self):
        self._handle(self._get)

    def do_POST(self):
        self._handle(self._post)

    def do_PUT(self):
        self._handle(self._put)

    def _handle(self, answer):
        self.requests.append(f"{self.command} {self.path}")
        fault = next(
            (f for f in self.faults if f[0] == self.command and re.search(f[1], self.path)), None
        )
        if fault is not None:
            self.faults.remove(fault)
        self.lost = fault is not None and fault[2] == "lost"
        self.spoils = fault is not None and fault[2] == "spoil"
        self.body = b"" if fault is not None and fault[2] == "cut" else self._read()
        if fault is None or self.lost or self.spoils:
            answer()
        elif fault[2] == "cut":
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._answer(
                fault[2],
                b"{}",
                "application/json",
                **({"Retry-After": 1} if fault[2] == 429 else {}),
            )

    def _read(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _role(self, repo=None):
        """The token's role; in a repository "write" if it may write there, else "read"; or None."""
        role = self.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        return "write" if repo is not None and role == repo.parent.name else role

    def _post(self):
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":
            return self._validate(json.loads(self.body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if path.endswith("/objects/batch"):
            return self._batch()
        repo, rest = self._parts("/api/")
        if repo is None:
            return self._fail()
        if rest.startswith("paths-info/"):
            is_json = self.headers["Content-Type"] == "application/json"
            paths = (
                json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode())["paths"]
            )
            return self._json([self._entry(repo, path) for path in paths if (repo / path).exists()])
        if self._role(repo) != "write":
            return self._fail("Forbidden", 403)
        if rest.startswith("preupload/"):
            return self._json(
                {"files": [self._mode(repo, file) for file in json.loads(self.body)["files"]]}
            )
        if rest.startswith("commit/"):
            return self._commit(repo)
        return self._fail()

    def _validate(self, content):
        """A part of the Hub's own checks of a card."""
        errors = []
        try:
            data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)[1])
            for key in ("base_model", "license", "library_name", "pipeline_tag"):
                if not isinstance(data.get(key, "x"), str) or data.get(key, "x").startswith("/"):
                    errors.append(f'"{key}" must be an identifier')
            if data.get("base_model_relation", "adapter") not in (
                "adapter",
                "finetune",
                "quantized",
                "merge",
            ):
                errors.append('"base_model_relation" is none')
            for model in data.get("model-index", []):
                assert model["name"] and all(
                    one["task"]["type"] and one["metrics"] for one in model["results"]
                )
        except (TypeError, KeyError, AssertionError, yaml.YAMLError) as error:
            errors.append(f"no metadata: {error}")
        content = {"errors": [{"message": message} for message in errors], "warnings": []}
        self._answer(400 if errors else 200, json.dumps(content).encode(), "application/json")

    def _create(self, body):
        repo = self.root / f"{body.get('type', 'model')}s" / body["organization"] / body["name"]
        if self._role(repo) != "write":
            return self._fail("Forbidden", 403)
        is_new = not repo.is_dir()
        repo.mkdir(parents=True, exist_ok=True)
        if is_new and body.get("visibility") == "private":
            self.private.add(repo)
        content = json.dumps(
            {"url": f"{self.address}/{body['organization']}/{body['name']}"}
        ).encode()
        self._answer(200 if is_new else 409, content, "application/json")

    def _mode(self, repo, file):
        path = repo / file["path"]
        entry = self._entry(repo, file["path"]) if path.exists() else {}
        oid = entry.get("lfs", entry).get("oid")
        large = file["path"].endswith(LARGE)
        return {
            "path": file["path"],
            "uploadMode": "lfs" if large else "regular",
            "shouldIgnore": False,
            "oid": oid,
        }

    def _batch(self):
        objects = json.loads(self.body)["objects"]
        for one in objects:
            if not (self.root / "lfs" / one["oid"]).exists():
                one["actions"] = {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _put(self):
        oid = self.path.removeprefix("/lfs/")
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._fail("BadContent", 400)
        (self.root / "lfs").mkdir(exist_ok=True)
        (self.root / "lfs" / oid).write_bytes(self.body)
        self._answer(200, b"", "text/plain")

    def _commit(self, repo):
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value, path = line["value"], repo / line["value"]["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "deletedFile":
                path.unlink()
            elif line["key"] == "file":
                path.write_bytes(b64decode(value["content"]) + b" " * self.spoils)
            elif (self.root / "lfs" / value["oid"]).exists():
                path.write_bytes((self.root / "lfs" / value["oid"]).read_bytes())
            else:  # it came by Xet: its chunks are in root/xet
                path.write_bytes(
                    b"xet " + json.dumps({"oid": value["oid"], "size": value["size"]}).encode()
                )
        commits = self.heads.setdefault(repo, [])
        sha = hashlib.sha1(f"{repo} {len(commits)} {header}".encode()).hexdigest()
        commits.append(sha)
        shutil.copytree(repo, self.root / "commits" / sha)
        name = "/".join(repo.parts[-2:])
        self._json({"commitUrl": f"{self.address}/{name}/commit/{sha}", "commitOid": sha})

    def _get(self):
        path = urlsplit(self.path).path
        if path == "/api/whoami-v2":
            if self._role() is None:
                return self._fail("Unauthorized", 401)
            auth = {
                "accessToken": {
                    "role": self._role() if self._role() in ("read", "write") else "fineGrained"
                }
            }
            about = {"name": "me", "type": "user", "orgs": [{"name": "org"}]}
            return self._json({**about, "auth": auth})
        if path.startswith("/api/"):
            repo, rest = self._parts("/api/")
            if repo is None:
                return self._fail()
            if rest.startswith("xet-write-token/"):
                url, until = f"local://{self.root / 'xet'}", int(time.time()) + 3600
                return self._json({"casUrl": url, "accessToken": "x", "exp": until})
            if rest == "auth-check/write":
                return (
                    self._json({}) if self._role(repo) == "write" else self._fail("Forbidden", 403)
                )
            if rest.startswith("tree/"):
                revision, _, folder = unquote(rest.removeprefix("tree/")).partition("/")
                repo = self._at(repo, revision)
                files = [file for file in self._names(repo) if file.startswith(folder)]
                return self._json([self._entry(repo, file) for file in files])
            sha = self._sha(repo, rest.removeprefix("revision/"))
            siblings = [{"rfilename": file} for file in self._names(repo)]
            about = {"id": "/".join(repo.parts[-2:]), "private": repo in self.private, "tags": []}
            return self._json({**about, "sha": sha, "siblings": siblings})
        repo, rest = self._parts("/")
        revision, _, name = rest.removeprefix("resolve/").partition("/")
        self.commit = self._sha(repo, revision)
        file = self._at(repo, revision) / name if repo and rest.startswith("resolve/") else None
        if file is None or not file.is_file():
            return self._fail("EntryNotFound" if repo else "RepoNotFound")
        content = file.read_bytes()
        self._answer(
            200, content, "application/octet-stream", ETag=f'"{hashlib.sha1(content).hexdigest()}"'
        )

    def _sha(self, repo, revision):
        commits = self.heads.get(repo, [])
        return revision if revision in commits else [COMMIT, *commits][-1]

    def _at(self, repo, revision):
        return self.root / "commits" / revision if revision in self.heads.get(repo, ()) else repo

    def _names(self, repo):
        return sorted(str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file())

    def _parts(self, prefix):
        """(the repository's folder or None, the rest of the path)."""
        path = unquote(urlsplit(self.path).path).removeprefix(prefix)
        kind = path.partition("/")[0] if path.split("/")[0] in KINDS else "models"
        user, _, rest = path.removeprefix(f"{kind}/").partition("/")
        name, _, rest = rest.partition("/")
        repo = self.root / kind / user / name
        hidden = repo in self.private and self._role() is None
        return repo if repo.is_dir() and not hidden else None, rest

    def _entry(self, repo, path):
        if (repo / path).is_dir():
            return {"type": "directory", "oid": "0" * 40, "path": path, "size": 0}
        content = (repo / path).read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "oid": blob, "size": len(content), "path": path}
        if content.startswith(b"xet "):
            entry |= {
                "size": json.loads(content[4:])["size"],
                "lfs": {**json.loads(content[4:]), "pointerSize": 134},
            }
        elif path.endswith(LARGE):
            entry["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 134,
            }
        return entry

    def _json(self, content):
        self._answer(200, json.dumps(content).encode(), "application/json")

    def _fail(self, code="RepoNotFound", status=404):
        self._answer(
            status,
            json.dumps({"error": code}).encode(),
            "application/json",
            **{"X-Error-Code": code},
        )

    def _answer(self, status, content, kind, **headers):
        if self.lost:
            return self.connection.shutdown(socket.SHUT_RDWR)
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(content),
            "X-Repo-Commit": self.commit,
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, *_):
        """A client that closes its connection is no event."""


@contextmanager
def serve(root):
    """Yields the server's handler class, with its address, requests, tokens, faults …"""
    state = {
        "root": Path(root),
        "requests": [],
        "tokens": {},
        "private": set(),
        "heads": {},
        "faults": [],
    }
    handler = type("Hub", (Handler,), state)
    server = Server(("127.0.0.1", 0), handler)
    handler.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def hub(root):
    """Yields (the address for HF_ENDPOINT, the list of requests), to read from."""
    with serve(root) as handler:
        yield handler.address, handler.requests


@contextmanager
def connected(address, cache):
    """This process uses the Hub at the address; another takes HF_ENDPOINT, read at the import."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "ENDPOINT": address,
            "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }.items():
            patch.setattr(constants, name, value)
        yield
    close_session()
