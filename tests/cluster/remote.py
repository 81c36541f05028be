"""Accesses storage that only hosts can reach: python -m tests.cluster.remote upload|events …"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pillsnap.observe.events import read_events
from pillsnap.storage import Storage


def upload(bucket: str, tree: Path, manifest: Path) -> None:
    """Create the bucket; upload photos to BUCKET/photos and the manifest to BUCKET/manifest."""
    import os

    from pyarrow import fs

    scheme, _, host = os.environ["AWS_ENDPOINT_URL"].partition("://")
    fs.S3FileSystem(endpoint_override=host, scheme=scheme, allow_bucket_creation=True).create_dir(bucket)
    photos, target = Storage(f"s3://{bucket}/photos"), Storage(f"s3://{bucket}/manifest")
    for path in sorted(tree.rglob("*.png")):
        photos.upload(path, path.relative_to(tree).as_posix())
    for name in ("manifest.parquet", "classes.json"):
        target.upload(manifest.parent / name, name)


if __name__ == "__main__":
    action, *words = sys.argv[1:]
    if action == "upload":
        upload(words[0], Path(words[1]), Path(words[2]))
    else:
        print(json.dumps(read_events(words[0])))
