"""A Hub on loopback: what huggingface_hub and datasets ask of the real one, for repositories in a folder."""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Serves root/models/USER/NAME and root/datasets/USER/NAME, every revision the same commit."""

    root: Path
    requests: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
        repo, rest = self._parts("/api/")
        if repo is None or not rest.startswith("paths-info/"):
            return self._fail()
        self._json([self._entry(repo, path) for path in body["paths"] if (repo / path).exists()])

    def do_GET(self):
        self.requests.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/"):
            repo, rest = self._parts("/api/")
            if repo is None:
                return self._fail()
            files = sorted(str(path.relative_to(repo)) for path in repo.rglob("*") if path.is_file())
            if rest.startswith("tree/"):
                folder = unquote(rest.removeprefix("tree/").partition("/")[2])
                return self._json([self._entry(repo, file) for file in files if file.startswith(folder)])
            name = "/".join(repo.parts[-2:])
            siblings = [{"rfilename": file} for file in files]
            return self._json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        repo, rest = self._parts("/")
        file = repo / rest.partition("/")[2].partition("/")[2] if repo and rest.startswith("resolve/") else None
        if file is None or not file.is_file():
            return self._fail("EntryNotFound" if repo else "RepoNotFound")
        content = file.read_bytes()
        self._answer(200, content, "application/octet-stream", ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    def _parts(self, prefix):
        """(the repository's folder or None, the rest of the path)."""
        path = unquote(urlsplit(self.path).path).removeprefix(prefix)
        kind = path.partition("/")[0] if path.startswith(("models/", "datasets/")) else "models"
        user, _, rest = path.removeprefix(f"{kind}/").partition("/")
        name, _, rest = rest.partition("/")
        repo = self.root / kind / user / name
        return repo if repo.is_dir() else None, rest

    def _entry(self, repo, path):
        if (repo / path).is_dir():
            return {"type": "directory", "oid": "0" * 40, "path": path, "size": 0}
        content = (repo / path).read_bytes()
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}

    def _json(self, content):
        self._answer(200, json.dumps(content).encode(), "application/json")

    def _fail(self, code="RepoNotFound"):
        self._answer(404, json.dumps({"error": code}).encode(), "application/json", **{"X-Error-Code": code})

    def _answer(self, status, content, kind, **headers):
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(content),
            "X-Repo-Commit": COMMIT,
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextmanager
def hub(root):
    """Yields (the address for HF_ENDPOINT, the list of GET and HEAD requests)."""
    handler = type("Hub", (Handler,), {"root": Path(root), "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler.requests
    finally:
        server.shutdown()
