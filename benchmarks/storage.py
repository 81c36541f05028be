"""Cost of a run that is kept in S3: `python -m benchmarks.storage [--quick] [--json FILE]`

Each figure has the same operation on a local disk as its control: reading a photo, committing a checkpoint. The server
is moto's, in a separate process on loopback; `--latency-ms` delays every request.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

PHOTO_BYTES = 1_300_000
READ_LIKE_A_BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    photos, megabytes = (64, 8) if options.quick else (320, 200)
    with tempfile.TemporaryDirectory() as folder, s3_server(options.latency_ms / 1e3):
        os.environ["PILLSNAP_CACHE_DIR"] = f"{folder}/cache"
        figures = {
            "latency_ms": options.latency_ms,
            **read_photos(Path(folder), photos),
            **save_checkpoints(Path(folder), megabytes),
        }
    for name, value in figures.items():
        print(f"{name:34} {value:10.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2), encoding="utf-8")


def read_photos(folder: Path, number: int) -> dict[str, float]:
    """Photos per second from disk, from S3 one by one, and from S3 with the read-ahead of the stream."""
    from pillsnap.photos.reader import PhotoReader, ReadAhead
    from pillsnap.storage import Storage

    storage, rng = Storage("s3://bench/photos"), np.random.default_rng(0)
    (folder / "photos").mkdir()
    paths = [f"{index}.bin" for index in range(number)]
    for path in paths:
        (folder / "photos" / path).write_bytes(rng.bytes(PHOTO_BYTES))
        storage.upload(folder / "photos" / path, path)
    batches = [paths[first : first + READ_LIKE_A_BATCH] for first in range(0, number, READ_LIKE_A_BATCH)]
    local, remote = PhotoReader(str(folder / "photos"), 10**9), PhotoReader(storage.uri, 10**9)

    def one_by_one(reader: PhotoReader) -> None:
        for path in paths:
            assert isinstance(reader.read_bytes(path), bytes)

    def ahead() -> None:
        for batch in batches:
            photos = ReadAhead(remote, batch)
            for path in batch:
                assert isinstance(photos.read_bytes(path), bytes)

    disk, single, several = (
        number / seconds(work) for work in (lambda: one_by_one(local), lambda: one_by_one(remote), ahead)
    )
    return {
        "photos_per_s_disk": disk,
        "photos_per_s_s3_one_by_one": single,
        "photos_per_s_s3": several,
        "photos_several_over_one_by_one": several / single,
    }


def save_checkpoints(folder: Path, megabytes: int) -> dict[str, float]:
    """Seconds to save a checkpoint on disk, and then to publish it; best of three."""
    import torch

    from pillsnap.runs.checkpoint import Position, save_checkpoint
    from pillsnap.runs.remote_checkpoints import PublishedCheckpoints

    weights = {"w": torch.rand(megabytes * 250_000 // 4)}
    store = PublishedCheckpoints("s3://bench/run", "detection", "worker")
    saved, published = [], []
    for step in range(1, 4):
        started_s = time.perf_counter()
        path = save_checkpoint(
            store.folder, Position(0, step, step), model=weights, ema=weights,
            trainer={"m": weights["w"], "v": weights["w"]}, meta={}, best=False, keep=2,
        )  # fmt: skip
        saved.append(time.perf_counter() - started_s)
        published.append(seconds(lambda: store.publish(path, best=False, keep=2, before_pointers=lambda: None)))  # noqa: B023
    return {
        "checkpoint_mb": megabytes,
        "checkpoint_s_disk": min(saved),
        "checkpoint_s_published_after": min(published),
        "checkpoint_published_over_disk": (min(saved) + min(published)) / min(saved),
    }


def seconds(work: Callable[[], object]) -> float:
    """Duration of a call."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


@contextmanager
def s3_server(latency_s: float) -> Iterator[None]:
    """An S3 server in a separate process with delayed responses, a bucket, and the environment for it."""
    code = (
        "import sys, time, logging; logging.getLogger('werkzeug').setLevel(40)\n"
        "from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app\n"
        "from werkzeug.serving import make_server\n"
        "app = DomainDispatcherApplication(create_backend_app)\n"
        "def slow(environ, start):\n"
        "    time.sleep(float(sys.argv[1]))\n"
        "    return app(environ, start)\n"
        "server = make_server('127.0.0.1', 0, slow, threaded=True)\n"
        "print(server.port, flush=True)\n"
        "server.serve_forever()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(latency_s)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    address = f"http://127.0.0.1:{process.stdout.readline().strip()}"
    os.environ.update(
        AWS_ENDPOINT_URL=address,
        AWS_ACCESS_KEY_ID="bench",
        AWS_SECRET_ACCESS_KEY="bench",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    try:
        urllib.request.urlopen(urllib.request.Request(f"{address}/bench", method="PUT")).close()
        yield
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
