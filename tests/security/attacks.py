"""Files that run code when they are read without care: each attempt leaves a file, which shows that it ran."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.conftest import ROOT

RECORDED = ROOT / "tests" / "assets" / "recorded_run"


class Attack:
    """An attempt named `name`; `succeeded` lists those whose code ran."""

    def __init__(self, folder: Path, name: str) -> None:
        self.mark = folder / name
        folder.mkdir(exist_ok=True)

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.shell,)

    @property
    def shell(self) -> str:
        return f"touch {self.mark}"

    @property
    def python(self) -> str:
        return f"__import__('os').system({self.shell!r})"


def succeeded(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*"))


def pickles(path: Path, attack: Attack, kind: str) -> Path:
    """Overwrite `path` with a pickle that attacks, in one of the formats that torch, numpy and Python read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch":
        torch.save({"model": attack, "ema": None, "state_dict": attack, "codes": [], "train_args": {}}, path)
    elif kind == "torch, old format":
        torch.save({"model": attack}, path, _use_new_zipfile_serialization=False)
    elif kind == "numpy":
        with path.open("wb") as file:
            np.savez(file, params=np.array([attack], object))
    else:
        assert kind == "pickle"
        path.write_bytes(pickle.dumps(attack))
    return path


PICKLES = ("torch", "torch, old format", "numpy", "pickle")


def model_file(path: Path, attack: Attack) -> Path:
    """A model of ultralytics that works, with an activation that attacks when it is evaluated."""
    import ultralytics

    source = next(Path(ultralytics.__file__).parent.glob("cfg/models/11/yolo11.yaml"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'activation: "{attack.python} or torch.nn.SiLU()"\n{source.read_text(encoding="utf-8")}')
    return path


def calling_model_file(path: Path, attack: Attack) -> Path:
    """A model of ultralytics whose first layer is a function that attacks by its argument."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "nc: 1\nscales: {n: [0.5, 0.25, 1024]}\n"
        f"backbone: [[-1, 1, check_requirements, ['--help; {attack.shell}', True]]]\nhead: []\n"
    )
    return path


def pickled_columns(path: Path, attack: Attack) -> None:
    """Store a Parquet or Arrow file's text columns as objects that Ray Data unpickles."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
    else:
        table = pa.ipc.open_file(path.read_bytes()).read_all()
    columns, fields = [], []
    for field in table.schema:
        column = table[field.name]
        if pa.types.is_string(field.type) or pa.types.is_large_binary(field.type):
            column = pa.chunked_array([pa.array([pickle.dumps(attack)] * len(table), pa.large_binary())])
            mark = {
                "ARROW:extension:name": "ray.data.arrow_pickled_object",
                "ARROW:extension:metadata": pickle.dumps(attack),
            }
            field = pa.field(field.name, pa.large_binary(), metadata=mark)
        columns.append(column)
        fields.append(field)
    table = pa.table(columns, schema=pa.schema(fields))
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def resealed(checkpoint: Path) -> None:
    """Record the hashes of a checkpoint's present files, as whoever changed them can."""
    meta = json.loads((checkpoint / "meta.json").read_text(encoding="utf-8"))
    meta.pop("sha256")
    meta["files"] = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in meta["files"]}
    text = json.dumps(meta, ensure_ascii=False, indent=1)
    meta["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "meta.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")


def foreign_run(folder: Path, **changed: Any) -> Path:
    """A run of both tasks, stopped after a step of the classifier, with settings `changed` (dotted keys, __ for .)."""
    shutil.copytree(RECORDED, folder)
    path = folder / "run" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8").replace("/recorded", str(folder)))
    config["settings"]["train"]["task"] = "both"
    for key, value in changed.items():
        group, _, name = key.partition("__")
        config["settings"][group][name] = value
    path.write_text(json.dumps(config), encoding="utf-8")
    checkpoints = folder / "run" / "checkpoints"
    shutil.copytree(checkpoints / "classification", checkpoints / "detection")
    for task in ("classification", "detection"):
        (checkpoints / task / "best.json").write_text('{"checkpoint": "step-00000002"}')
    return folder / "run"
