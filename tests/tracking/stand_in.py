"""A stand-in for wandb's server on loopback: it takes a run's rows, and says "there already" of every artifact.

As much of the protocol as wandb 0.31 asks for when a run is logged or synced; what it does not know, it answers with
nothing. So it is tied to the pinned version.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


class StandIn:
    """Serves while it is entered."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        """wandb-history.jsonl, as the server would have it."""
        self.runs: set[str] = set()
        self.alerts: list[str] = []
        self.artifacts: list[str] = []
        """Their types."""
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StandIn:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Answer a request."""
        if path == "/graphql":
            found = re.search(r"(?:query|mutation)\s+(\w+)", body["query"])
            return {"data": self._answer(found[1] if found else "", body.get("variables") or {})}
        history = (body.get("files") or {}).get("wandb-history.jsonl")
        if history:  # rows from `offset` on: a server keeps the first that it was told
            rows = [json.loads(line) for line in history["content"]]
            self.rows[history["offset"] :] = rows
        return {}

    def _answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        entity = {"id": "e", "name": "me"}
        if operation == "Viewer":
            viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}, "email": ""}
            return {"viewer": viewer}
        if operation == "RunResumeStatus":
            return {"model": {"id": "m", "name": "p", "entity": entity, "bucket": self._bucket(values["name"])}}
        if operation == "UpsertBucket":
            name, known = values["name"], values["name"] in self.runs
            self.runs |= {name}
            project = {"id": "p", "name": values["project"], "entity": entity}
            bucket = {"id": "r", "name": name, "displayName": name, "config": "{}", "project": project}
            bucket |= {"description": "", "sweepName": None, "historyLineCount": len(self.rows)}
            return {"upsertBucket": {"bucket": bucket, "inserted": not known}}
        if operation == "CreateArtifact":
            self.artifacts.append(values["input"]["artifactTypeName"])
            sequence = {"id": "s", "latestArtifact": None}
            return {"createArtifact": {"artifact": {"id": "a", "state": "COMMITTED", "artifactSequence": sequence}}}
        if operation == "ArtifactType":
            return {"project": {"artifact": None}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.address}/upload/{name}"} for name in values["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "NotifyScriptableRunAlert":
            self.alerts.append(values["title"])
            return {"notifyScriptableRunAlert": {"success": True}}
        return {}

    def _bucket(self, name: str) -> dict[str, Any] | None:
        """What a resume is told of a run that is there."""
        if name not in self.runs:
            return None
        tail = json.dumps([json.dumps(row) for row in self.rows[-1:]])
        counts = {"logLineCount": 0, "historyLineCount": len(self.rows), "eventsLineCount": 0}
        texts = {"summaryMetrics": "{}", "config": "{}", "wandbConfig": "{}", "eventsTail": "[]", "historyTail": tail}
        return {"id": "r", "name": name, "displayName": name, "tags": [], "notes": "", **counts, **texts}


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client that was killed."""


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Quiet."""

        def _body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def _say(self, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._say({})

        def do_PUT(self) -> None:
            self._body()
            self._say({})

        def do_POST(self) -> None:
            body = self._body()
            try:
                values = json.loads(body)
            except ValueError:
                values = {}
            self._say(stand_in.post(self.path, values))

    return Handler
