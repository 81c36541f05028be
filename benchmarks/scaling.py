"""Does the loader's throughput grow with hosts: 1, 2 and 4 worker hosts, each held to the same share of a core?

    python -m benchmarks.scaling [--quick] [--share CORES] [--seconds S] [--json FILE]

Hosts are network namespaces of this machine, each with its own raylet (tests/cluster) and a CPU quota of the kernel;
the quotas together should leave a quarter of the machine's cores to the head, which has none. On every host one
process reads its share of a stream of 224 px crops from 976 x 1280 photos, which the hosts' tasks decode. The control,
in the same run and under the same quotas, is a bare loop per host that reads, decodes and warps. Needs root; where
such hosts cannot be made, it prints the reason and exits with 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.cluster.hosts import cpu_controller, why_not
from tests.cluster.ray_hosts import ROOT, RayHosts

HOSTS = (1, 2, 4)
BATCH, SIZE_PX, MARGIN = 32, 224, 0.12
DECODING_CPUS = 0.5  # a core has a second task while one ends
EPOCH_REPEATS = 50
WARM_UP_S = 20.0
_LINGER_S = 4.0
"""Time that a consumer keeps reading after its window, so that others are not blocked within theirs."""
TARGET = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="1 and 2 hosts, seconds: shows that it runs")
    parser.add_argument("--share", type=float, help="cores a host [default: three quarters of the machine's by 4]")
    parser.add_argument("--seconds", type=float, default=40.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--loader", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.loader:
        print("FIGURES " + json.dumps(read_stream(options.loader, options.seconds)), flush=True)
        return
    if options.bare:
        print("FIGURES " + json.dumps(bare_loop(options.bare, options.seconds)), flush=True)
        return
    reason = why_not() or ("" if cpu_controller() else "the cgroup of this process does not support CPU quotas")
    if reason:
        print(f"no hosts here: {reason}")
        return
    share = options.share or 0.75 * (os.cpu_count() or 1) / max(HOSTS)
    seconds = 8.0 if options.quick else options.seconds
    with tempfile.TemporaryDirectory(prefix="pillsnap-scaling-") as name:
        folder = Path(name)
        prepare(folder, 40 if options.quick else 300)
        results = {
            number: measure(folder, number, share, seconds) for number in (HOSTS[:2] if options.quick else HOSTS)
        }
    show(results, share)
    if options.json:
        options.json.write_text(json.dumps({"share": share, "hosts": results}, indent=2), encoding="utf-8")


def prepare(folder: Path, num_photos: int) -> None:
    """Create photos and their manifest."""
    from pillsnap.manifest.build import build_manifest
    from pillsnap.synthetic import generate

    generate(folder / "photos", num_classes=10, num_singles=num_photos, num_combinations=0)
    build_manifest(folder / "photos", folder / "run", num_photos=None, num_classes=None, val_fraction=0.1)


def measure(folder: Path, number: int, share: float, seconds: float) -> dict[str, float]:
    """Images per second of the loader and of the bare loops on `number` hosts."""
    with RayHosts([folder], workers=number, cpus=1, cpu_share=2 * share) as cluster:
        environment = cluster.environment() | {"RAY_ADDRESS": f"{cluster.head.ip}:6379"}
        command = [sys.executable, "-m", "benchmarks.scaling", "--seconds", str(seconds)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "env": environment, "cwd": ROOT, "text": True}
        for worker in cluster.workers:  # started with twice the share
            worker.set_share(share)
        loops = [worker.start(*command, "--bare", str(folder), **pipes) for worker in cluster.workers]
        bare = [figures(loop) for loop in loops]
        throttled_s = [worker.throttled_s() for worker in cluster.workers]
        loader = figures(cluster.head.start(*command, "--loader", str(folder), **pipes))
        held = [worker.throttled_s() - before for worker, before in zip(cluster.workers, throttled_s, strict=True)]
    return {
        "images_per_s": loader["images_per_s"],
        "first_batch_s": loader["first_batch_s"],
        "bare_images_per_s": sum(rate["images_per_s"] for rate in bare),
        "least_throttled_s": min(held),
    }


def figures(process: subprocess.Popen) -> dict[str, float]:
    """Results printed by a measuring process."""
    output, _ = process.communicate(timeout=1800)
    lines = [line for line in output.splitlines() if line.startswith("FIGURES ")]
    if process.returncode or not lines:
        raise RuntimeError(f"a measuring process exited with {process.returncode}: {output[-1000:]}")
    return json.loads(lines[-1].removeprefix("FIGURES "))


def show(results: dict[int, dict[str, float]], share: float) -> None:
    """Print the table with the ratio to linear scaling."""
    print(f"each host limited to {share:.3f} cores of {os.cpu_count()}")
    heads = zip(
        ("hosts", "loader", "of linear", "bare loops", "of linear", "loader to bare", "first batch"),
        (6, 14, 11, 16, 11, 16, 13),
        strict=True,
    )
    print("".join(f"{head:>{width}}" for head, width in heads))
    first = results[1]
    for number, row in results.items():
        linear = row["images_per_s"] / first["images_per_s"] / number
        bare = row["bare_images_per_s"] / first["bare_images_per_s"] / number
        print(
            f"{number:>6}{row['images_per_s']:>8.1f} img/s{linear:>11.3f}{row['bare_images_per_s']:>10.1f} img/s"
            f"{bare:>11.3f}{row['images_per_s'] / row['bare_images_per_s']:>16.3f}{row['first_batch_s']:>11.1f} s"
        )
    worst = min(row["images_per_s"] / first["images_per_s"] / number for number, row in results.items())
    print(f"least of linear {worst:.3f}, target {TARGET}: {'met' if worst >= TARGET else 'missed'}")


def bare_loop(folder: Path, seconds: float) -> dict[str, float]:
    """Images per second of one process that reads, decodes and warps."""
    import cv2
    import numpy as np

    from pillsnap.data import augment
    from pillsnap.data.malloc import keep_freed_memory
    from pillsnap.photos.decode import decode_image

    cv2.setNumThreads(1)
    keep_freed_memory()
    samples, jitter = _samples(folder), _recipe().jitter
    done, begin = 0, time.perf_counter()
    warm_s = min(WARM_UP_S, seconds) / 2
    while (now := time.perf_counter()) - begin < warm_s + seconds:
        if now - begin < warm_s:
            done, since = 0, now
        row = done % len(samples)
        photo = decode_image((folder / "photos" / samples["location"][row].as_py()).read_bytes())
        box = np.array(samples["box"][row].as_py())
        augment.crop(photo, box, SIZE_PX, MARGIN, jitter, augment.sample_rng(0, 0, str(done)))
        done += 1
    return {"images_per_s": done / (time.perf_counter() - since)}


def read_stream(folder: Path, seconds: float) -> dict[str, float]:
    """Images per second of the stream on all hosts of the cluster at RAY_ADDRESS, one consumer per host."""
    import pyarrow as pa
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from pillsnap.cluster.session import ray_session
    from pillsnap.data.plan import StreamPlan
    from pillsnap.data.stream import Stream, share_samples
    from pillsnap.photos.reader import PhotoReader

    with ray_session():
        hosts = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        # Long epochs: the weight of their last, partial batches would grow with the hosts.
        samples = pa.concat_tables([_samples(folder)] * EPOCH_REPEATS)
        plan = StreamPlan(0, 10_000, len(samples), 0, BATCH * len(hosts), len(hosts))
        shared = share_samples(samples)
        stream = Stream(
            plan, _recipe(), PhotoReader(str(folder / "photos"), 64_000_000), shared, shared, 1, DECODING_CPUS
        )
        shards = stream.dataset(0, hosts).streaming_split(len(hosts), equal=True)
        actor = ray.remote(num_cpus=0)(_Consumer)
        consumers = [
            actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in hosts
        ]
        started_s = time.time()
        reads = [
            consumer.read.remote(shard, WARM_UP_S, seconds) for consumer, shard in zip(consumers, shards, strict=True)
        ]
        shares = ray.get(reads)
    return {"images_per_s": sum(share["images_per_s"] for share in shares),
            "first_batch_s": max(share["first_s"] for share in shares) - started_s}  # fmt: skip


class _Consumer:
    """Reads its shard as a training worker does, without computing."""

    def read(self, shard: Any, warm_up_s: float, seconds: float) -> dict[str, float]:
        from pillsnap.data.stream import batches_of

        images, first_s, begin, last = 0, 0.0, 0.0, 0.0
        for batch in batches_of(shard):
            now = time.perf_counter()
            if not first_s:
                first_s, started = time.time(), now
            if now - started < warm_up_s:
                begin = last = now
                continue
            if now - begin <= seconds:
                images += int(batch["valid"].sum())
                last = now
            elif now - begin > seconds + _LINGER_S:
                break
        return {"images_per_s": images / (last - begin), "first_s": first_s}


def _samples(folder: Path) -> Any:
    from pillsnap.data.samples import classification_samples
    from pillsnap.manifest.table import read_classes, read_manifest

    codes = [entry.code for entry in read_classes(folder / "run")]
    return classification_samples(read_manifest(folder / "run"), codes).train


def _recipe() -> Any:
    from pillsnap.data.augment import CropJitter
    from pillsnap.data.recipes import CropRecipe

    return CropRecipe(SIZE_PX, MARGIN, CropJitter(0.06, 0.12, 180.0))


if __name__ == "__main__":
    main()
