"""As much of the hub's protocol as reading one public data set of a few files takes, on a local port."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

REPOSITORY = "lab/sums"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# Sums\n",
    "data/train.jsonl": b'{"question": "1+1=", "gold": 2}\n{"question": "2+2=", "gold": 4}\n',
    "data/test.jsonl": b'{"question": "3+3=", "gold": 6}\n',
}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").split("/")
        match parts:
            case ["api", "datasets", "lab", "sums"] | ["api", "datasets", "lab", "sums", "revision", "main"]:
                self._info()
            case ["api", "datasets", "lab", "sums", "revision", revision]:
                self._info() if revision == COMMIT else self._refuse("RevisionNotFound")
            case ["api", "datasets", "lab", "sums", "tree", _, *folder]:
                self._list("".join(f"{name}/" for name in folder))
            case ["datasets", "lab", "sums", "resolve", _, *name] if "/".join(name) in FILES:
                content = FILES["/".join(name)]
                self._reply(200, content, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT})
            case ["datasets", "lab", "sums", "resolve", *_]:
                self._refuse("EntryNotFound")
            case _:
                self._refuse("RepoNotFound")

    do_HEAD = do_GET  # noqa: N815

    def _info(self) -> None:
        siblings = [{"rfilename": name} for name in FILES]
        self._reply(200, {"id": REPOSITORY, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def _list(self, folder: str) -> None:
        found: dict[str, Any] = {}
        for name, content in FILES.items():
            if name.startswith(folder):
                first, _, rest = name[len(folder) :].partition("/")
                path = folder + first
                file = {"type": "file", "path": path, "size": len(content), "oid": _digest(content)}
                found[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} if rest else file
        self._reply(200, list(found.values())) if found else self._refuse("EntryNotFound")

    def _refuse(self, code: str) -> None:
        self._reply(404, {"error": code}, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def _reply(self, status: int, value: Any, headers: Mapping[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def hub() -> Iterator[str]:
    """Serves; gives the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
