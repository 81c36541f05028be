"""A run whose photos, manifest, checkpoints and events are in S3, with driver and workers that share no disk."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from pillsnap.observe.events import read_events
from pillsnap.storage import Storage
from tests.conftest import ROOT, S3_SECRET
from tests.integration.test_train import TINY
from tests.processes import descendants, titled

TIMEOUT_S = 600
SETTINGS = TINY | {
    "detection.epochs": 3,
    "train.hang_timeout_s": 300,
    "targets.top1": "null",  # exit code 0
    "targets.map50": "null",
}


class Host:
    """Two separate cache folders: one for the driver's machine, one for the workers' machine."""

    def __init__(self, folder: Path, storage: str) -> None:
        self.folder, self.storage = folder, storage

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        caches = [str(self.folder / "driver"), str(self.folder / "worker")]
        command = [sys.executable, "-m", "tests.integration.remote_driver", *caches, *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"COLUMNS": "250"},
        )  # fmt: skip

    def train(self, num_workers: int = 1) -> subprocess.Popen[str]:
        options = [f"--set={key}={value}" for key, value in SETTINGS.items()]
        return self.start(
            "train", "--preset=demo", f"--storage={self.storage}/runs", "--run=toy", "--log-level=DEBUG",
            f"--num-workers={num_workers}",
            f"--manifest={self.storage}/manifest", f"--data-root={self.storage}/photos", *options,
        )  # fmt: skip

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments)
        out, errors = process.communicate(timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(arguments, process.returncode, out, errors)


@pytest.fixture
def bucket(s3_environment: str, toy_tree: Path, toy_manifest: Path) -> str:
    """Photos and manifest in S3."""
    photos, manifest = Storage(f"{s3_environment}/photos"), Storage(f"{s3_environment}/manifest")
    for path in toy_tree.rglob("*.png"):
        photos.upload(path, path.relative_to(toy_tree).as_posix())
    for name in ("manifest.parquet", "classes.json"):
        manifest.upload(toy_manifest.parent / name, name)
    return s3_environment


def events_of(uri: str, kind: str, **wanted: Any) -> list[dict[str, Any]]:
    return [
        event for event in read_events(uri)
        if event["kind"] == kind and all(event.get(key) == value for key, value in wanted.items())
    ]  # fmt: skip


def test_killed_run_continues_on_another_machine(bucket: str, tmp_path: Path) -> None:
    """The machine is lost in detection's second epoch: the same command on another one continues from the published
    checkpoint, and evaluate, predict, verify, logs and monitor need only the run's URI.
    """
    uri = f"{bucket}/runs/toy"
    first = Host(tmp_path / "first", bucket)
    process = first.train()
    end_s = time.monotonic() + TIMEOUT_S
    # Events of the second epoch may be published before the first checkpoint is.
    published = Storage(f"{uri}/checkpoints/detection")
    while not (
        published.read("last.json") and [e for e in events_of(uri, "step", task="detection") if e["epoch"] == 2]
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.2)
    machine = [psutil.Process(process.pid), *descendants(process.pid)]
    for each in machine:  # an orphaned worker would write while its folder is deleted
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.communicate()
    assert not psutil.wait_procs(machine, timeout=60)[1]
    pointer = json.loads(published.read("last.json") or b"")
    meta = json.loads(published.read(f"{pointer['checkpoint']}/meta.json") or b"")
    published_step = meta["position"]["global_step"]
    assert published_step > 0
    assert published_step in [e["step"] for e in events_of(uri, "checkpoint")]
    assert list((first.folder / "driver").rglob("events.jsonl"))
    assert not list((first.folder / "worker").rglob("events.jsonl"))  # the machines share no disk
    assert not list((first.folder / "driver").rglob("model.safetensors"))
    shutil.rmtree(first.folder)

    second = Host(tmp_path / "second", bucket)
    process = second.train(num_workers=2)
    out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    assert "continuing the run demo-" in out and f"report: {uri}/report.html" in out.replace("\n", "")
    starts = events_of(uri, "task", status="started")
    assert [(e["task"], e["step"]) for e in starts] == [
        ("detection", 0), ("detection", published_step), ("classification", 0)
    ]  # fmt: skip
    for task in ("detection", "classification"):
        steps = [e["step"] for e in events_of(uri, "step", task=task)]
        assert steps == list(range(1, len(steps) + 1))
        epochs = SETTINGS[f"{task}.epochs"]
        for kind in ("epoch", "validation"):
            assert [e["epoch"] for e in events_of(uri, kind, task=task)] == list(range(1, epochs + 1))
    there = set(Storage(uri).files())
    assert {
        "config.json", "classes.json", "manifest.parquet", "metrics.json", "report.html", "events.jsonl", "train.log",
        "checkpoints/demo_detection_best.pt", "checkpoints/demo_classification_best.pt", "predictions/pipeline.parquet",
        "checkpoints/detection/last.json", "checkpoints/classification/best.json",
    } <= there  # fmt: skip
    for example in events_of(uri, "examples"):
        assert example["path"] in there
    assert ".driver.lock" not in there
    assert len({name.split("/")[2] for name in there if name.startswith("checkpoints/detection/step-")}) <= 3
    log = (Storage(uri).read("train.log") or b"").decode()
    assert "driver" in log and "rank 0" in log
    config = json.loads(Storage(uri).read("config.json") or b"")
    assert config["manifest"] == f"{uri}/manifest.parquet" and config["data_root"] == f"{bucket}/photos"

    reader = Host(tmp_path / "reader", bucket)
    evaluated = reader("evaluate", f"--run={uri}", f"--json={tmp_path / 'metrics.json'}")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert evaluated.returncode == (0 if metrics["met"] else 1), evaluated.stderr
    assert metrics["detection"]["num_photos"] > 0 and metrics["classification"]["num_samples"] > 0
    assert len(events_of(uri, "verdict")) == 2
    photo = next(iter(Storage(f"{bucket}/photos").files()))
    Storage(f"{bucket}/photos").download(photo, tmp_path / "photo.png")
    found = json.loads(reader("predict", f"--run={uri}", str(tmp_path / "photo.png")).stdout)
    assert found[0]["error"] is None
    checked = reader("verify", f"--run={uri}")
    assert "detection: last checkpoint" in checked.stdout and "every file as recorded" in checked.stdout
    shown = reader("logs", f"--run={uri}", "--lines=3")
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) == 3, shown.stderr
    watched = reader("monitor", f"--run={uri}")
    assert "detection" in watched.stdout, watched.stderr

    for name in Storage(bucket).files():
        assert S3_SECRET.encode() not in (Storage(bucket).read(name) or b""), name
    for folder in (second.folder, reader.folder):
        for path in folder.rglob("*"):
            assert not path.is_file() or S3_SECRET.encode() not in path.read_bytes(), path
    assert S3_SECRET not in out + errors


@pytest.fixture
def denying_server() -> Iterator[str]:
    """An S3 server that denies every request."""

    class DenyAll(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), DenyAll)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("endpoint", "storage", "reason"),
    [
        ("", "s3://no-such-bucket-at-all/runs", "NO_SUCH_BUCKET"),
        ("http://127.0.0.1:9", "s3://pills/runs", "NETWORK_CONNECTION"),
        ("denying", "s3://pills/runs", "ACCESS_DENIED"),
    ],
)
def test_unusable_storage_is_a_one_line_error_within_seconds(
    endpoint: str, storage: str, reason: str, s3_environment: str, denying_server: str, toy_manifest: Path,
    toy_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", denying_server if endpoint == "denying" else endpoint)
    started_s = time.monotonic()
    ended = Host(tmp_path, storage)(
        "train", "--preset=demo", f"--storage={storage}", "--run=toy", f"--manifest={toy_manifest}",
        f"--data-root={toy_tree}",
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.startswith(f"pillsnap: {storage}/toy") and reason in ended.stderr
    assert time.monotonic() - started_s < 30


def test_deleted_bucket_ends_the_run_with_one_line(
    s3_environment: str, s3_server: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    host = Host(tmp_path, s3_environment)
    options = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    process = host.start(
        "train", "--preset=demo", "--task=classification", f"--storage={s3_environment}/runs", "--run=toy",
        f"--manifest={toy_manifest}", f"--data-root={toy_tree}", *options,
    )  # fmt: skip
    end_s = time.monotonic() + TIMEOUT_S
    while not events_of(f"{s3_environment}/runs/toy", "task", status="started"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.2)
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/moto-api/reset", method="POST")).close()
    out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2, out
    *warnings, line = errors.strip().splitlines()
    assert len(warnings) <= 1 and all("lock could not be renewed" in warning for warning in warnings), warnings
    assert line.startswith("pillsnap: The checkpoint at step ") and "could not be published" in line
    assert "NO_SUCH_BUCKET" in line and "the one before is intact" in line
    assert "the end of the run was not published" in out


def test_validate_has_the_same_findings_in_s3(bucket: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    host = Host(tmp_path, bucket)
    findings = []
    missing = next(iter(Storage(f"{bucket}/photos").files()))
    Storage(f"{bucket}/photos").remove(missing)
    kept = tmp_path / "photos"
    shutil.copytree(toy_tree, kept)
    (kept / missing).unlink()
    for manifest, root in ((f"{bucket}/manifest", f"{bucket}/photos"), (str(toy_manifest), str(kept))):
        file = tmp_path / "findings.json"
        ended = host("manifest", "validate", manifest, f"--data-root={root}", f"--json={file}")
        assert ended.returncode == 1, ended.stderr
        findings.append(json.loads(file.read_text()) | {"manifest": ""})
    assert findings[0] == findings[1]
    assert missing in json.dumps(findings[0])


@pytest.mark.reliability
def test_killed_worker_continues_from_the_published_checkpoint(
    s3_environment: str, toy_manifest: Path, toy_tree: Path, tmp_path: Path
) -> None:
    uri = f"{s3_environment}/runs/toy"
    host = Host(tmp_path, s3_environment)
    options = [f"--set={key}={value}" for key, value in (SETTINGS | {"classification.epochs": 4}).items()]
    process = host.start(
        "train", "--preset=demo", "--task=classification", f"--run={uri}", f"--manifest={toy_manifest}",
        f"--data-root={toy_tree}", *options,
    )  # fmt: skip
    end_s = time.monotonic() + TIMEOUT_S
    while not Storage(f"{uri}/checkpoints/classification").read("last.json"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.1)
    (worker,) = titled("RayTrainWorker", process.pid)
    worker.kill()
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    first, second = events_of(uri, "task", status="started")
    assert first["step"] == 0 and second["step"] in [e["step"] for e in events_of(uri, "checkpoint")]
    steps = [e["step"] for e in events_of(uri, "step")]
    assert steps == list(range(1, len(steps) + 1))
    assert [e["epoch"] for e in events_of(uri, "epoch")] == [1, 2, 3, 4]
