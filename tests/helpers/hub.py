"""A server that plays the hub's HTTP interface as far as an upload needs it, and keeps what it is sent."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """files: path -> content of what was committed to `repo`. calls: (path, Authorization header) of each request."""

    def __init__(self, repo: str):
        self.repo = repo
        self.files: dict[str, bytes] = {}
        self.calls: list[tuple[str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                hub.calls.append((self.path, self.headers["Authorization"]))
                answer = json.dumps(hub.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: str) -> dict:
        of_repo = f"/api/models/{self.repo}/"
        if path == "/api/repos/create":
            return {"url": f"{self.url}/{self.repo}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.startswith(of_repo + "preupload/"):
            asked = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": file, "uploadMode": "regular", "shouldIgnore": False} for file in asked]}
        assert path.startswith(of_repo + "commit/"), path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{self.repo}/commit/{'0' * 40}"}
