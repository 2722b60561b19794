"""A server on this machine that answers as the Hugging Face Hub does, for one model: create, upload, download."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 40


class HubStub:
    """`files`: what was uploaded; `tokens`: the Authorization headers of writing requests; `url`: for HF_ENDPOINT."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length) if length else self._read_chunks()
                hub.tokens.add(str(self.headers.get("Authorization")))
                self._send(200, json.dumps(self._answer(body)).encode())

            def _answer(self, body: bytes) -> Any:
                if self.path == "/api/repos/create":
                    return {"url": f"{hub.url}/user/name", "name": "user/name"}
                if self.path == "/api/validate-yaml":
                    return {"errors": [], "warnings": []}
                if "/preupload/" in self.path:
                    files = json.loads(body)["files"]
                    modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    return {"files": [{"path": file["path"], **modes} for file in files]}
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                url = f"{hub.url}/user/name/commit/{COMMIT}"
                return {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}

            def _read_chunks(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return b""
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def do_GET(self) -> None:
                self._find(is_head=False)

            def do_HEAD(self) -> None:
                self._find(is_head=True)

            def _find(self, is_head: bool) -> None:
                if self.path.startswith("/api/models/user/name"):
                    siblings = [{"rfilename": name} for name in hub.files]
                    self._send(200, json.dumps({"id": "user/name", "sha": COMMIT, "siblings": siblings}).encode())
                    return
                name = self.path.rpartition("/")[2]
                if self.path.startswith("/user/name/resolve/") and name in hub.files:
                    content = hub.files[name]
                    etag = hashlib.sha256(content).hexdigest()
                    self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, is_head)
                    return
                code = "EntryNotFound" if self.path.startswith("/user/name/") else "RepoNotFound"
                self._send(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, is_head)

            def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None, is_head: bool = False) -> None:
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if not is_head:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> HubStub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
