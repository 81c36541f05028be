"""Weights & Biases for tests: a reader of offline folders, and a local server that receives uploads."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BLOCK_BYTES = 32768


@pytest.fixture(autouse=True)
def no_account(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.2")  # else 15 s
    yield


def read_offline_history(folder: Path) -> list[dict[str, Any]]:
    """History rows of an offline folder."""
    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in read_offline_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def read_offline_records(folder: Path) -> Iterator[Any]:
    """All records of an offline folder.

    The file is a LevelDB log: a 7-byte header, then blocks of 32 KiB with records of (crc32, length, type, data), where
    type 1 is a whole record and 2, 3, 4 are the first, middle and last piece of one.
    """
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("run-*.wandb")
    data = path.read_bytes()
    position, pieces = 7, b""
    while position + 7 <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < 7:
            position += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        assert zlib.crc32(data[position + 6 : position + 7 + length]) == crc
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(pieces)
            pieces = b""


class WandbServer:
    """Fake W&B server; `refuse_uploads` answers 401 to metric uploads, `refuse_all` to every request."""

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.refuse_uploads = False
        self.refuse_all = False
        self.upserts: list[dict[str, Any]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                code, answer = outer.answer(self.path, body)
                content = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Ignore connections closed by killed clients."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        if self.refuse_all:
            return 401, {"errors": [{"message": "bad key"}]}
        if path == "/graphql":
            request = json.loads(body)
            return 200, {"data": self.graphql(request["query"], request.get("variables") or {})}
        if path.endswith("/file_stream"):
            if self.refuse_uploads:
                return 401, {"error": "bad key"}
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl")
            if history:
                rows = self.rows.setdefault(path.split("/")[-2], [])
                rows[history["offset"] :] = [json.loads(line) for line in history["content"]]
        return 200, {}

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "P", "name": "pillsnap", "entity": {"id": "E", "name": "someone"}}
        if "upsertBucket" in query:
            self.upserts.append(variables)
            bucket = {"id": "B", "name": variables["name"], "displayName": "n", "config": "{}", "sweepName": None}
            return {"upsertBucket": {"bucket": {**bucket, "project": project, "historyLineCount": 0}, "inserted": True}}
        if "RunResumeStatus" in query:
            rows = self.rows.get(variables["name"])
            if not rows:
                return {"model": {**project, "bucket": None}}
            bucket = {
                **{"id": "B", "name": variables["name"], "displayName": "n", "config": "{}", "tags": [], "notes": ""},
                **{"logLineCount": 0, "eventsLineCount": 0, "eventsTail": "[]", "wandbConfig": json.dumps({"t": 1})},
                **{"historyLineCount": len(rows), "historyTail": json.dumps([json.dumps(rows[-1])])},
                "summaryMetrics": json.dumps(rows[-1]),
            }
            return {"model": {**project, "bucket": bucket}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "B", "uploadHeaders": [], "files": files}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": [], "cliVersionInfo": {"max_cli_version": "0.99.0"}}}
        if "viewer" in query:
            return {"viewer": {"id": "V", "entity": "someone", "flags": "{}", "teams": {"edges": []}}}
        return {}


@pytest.fixture
def offline_history() -> Callable[[Path], list[dict[str, Any]]]:
    return read_offline_history


@pytest.fixture
def offline_records() -> Callable[[Path], Iterator[Any]]:
    return read_offline_records


@pytest.fixture
def wandb_server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.server.shutdown()
    server.server.server_close()
