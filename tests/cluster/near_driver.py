"""Prints the host that produced each batch: python -m tests.cluster.near_driver MANIFEST ROOT near|spread."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pillsnap.cluster.session import ray_session
from pillsnap.data.augment import CropJitter
from pillsnap.data.plan import Slot, StreamPlan
from pillsnap.data.recipes import Batch, CropRecipe
from pillsnap.data.samples import classification_samples
from pillsnap.data.sources import Source
from pillsnap.data.stream import Stream, batches_of, share_samples
from pillsnap.manifest.table import read_manifest
from pillsnap.photos.reader import PhotoReader

EPOCHS, BATCH = 48, 4


@dataclass(frozen=True)
class NodeRecipe(CropRecipe):
    """Adds the id of the producing node to each batch."""

    def make(
        self, samples: pa.Table, slot: Slot, seed: int, capacity: int, source: Source, images: Any = None
    ) -> Batch:
        node = np.frombuffer(bytes.fromhex(ray.get_runtime_context().get_node_id()), np.uint8)
        return super().make(samples, slot, seed, capacity, source, images) | {"node": node}


@ray.remote(num_cpus=0)
class Reader:
    """Reads the shard of one worker; returns producing node and samples of each batch."""

    def read(self, shard: Any) -> list[tuple[str, list[int]]]:
        return [(bytes(batch["node"]).hex(), [int(i) for i in batch["index"] if i >= 0]) for batch in batches_of(shard)]


def main(manifest_path: Path, root: str, near: bool) -> dict[str, Any]:
    with ray_session():
        manifest = read_manifest(manifest_path)
        codes = sorted({code for codes in manifest["codes"].to_pylist() for code in codes})
        samples = classification_samples(manifest, codes).train
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
        plan = StreamPlan(5, EPOCHS, len(samples), 0, BATCH * len(nodes), len(nodes))
        shared = share_samples(samples)
        recipe = NodeRecipe(224, 0.1, CropJitter(0.1, 0.1, 180))
        stream = Stream(plan, recipe, PhotoReader(root, 10**7), shared, shared, 2, 0.5)
        shards = stream.dataset(0, nodes if near else ()).streaming_split(len(nodes), equal=True)
        readers = [
            Reader.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in nodes
        ]
        shares = ray.get([reader.read.remote(shard) for reader, shard in zip(readers, shards, strict=True)])
    made = [(node == own, members) for own, share in zip(nodes, shares, strict=True) for node, members in share]
    return {
        "near": sum(here for here, _ in made) / len(made),
        "samples": sorted(number for _, members in made for number in members),
        "expected": sorted(list(range(len(samples))) * EPOCHS),
    }


if __name__ == "__main__":
    print("FIGURES " + json.dumps(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["near"])))
