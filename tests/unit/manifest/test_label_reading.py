"""Every reader returns the same labels in the same order; `auto` uses Ray Data where there is a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pillsnap.manifest import label_reading
from pillsnap.manifest.label_reading import read_all_labels
from pillsnap.manifest.labels import Label
from tests.unit.conftest import label_document


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Forty labels, some of them missing, broken, of another code or without a box."""
    monkeypatch.setattr(label_reading, "_CHUNK", 7)
    monkeypatch.setattr(label_reading, "_RAY_CHUNK", 7)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    jobs = []
    for number in range(40):
        code, name = f"K-{number:06d}", f"{number}.json"
        look = {"drug_dir": "뒷면", "drug_shape": "원형", "color_class1": "하양"} if number % 8 == 1 else {}
        text = json.dumps(label_document(code, bbox=[number, 1, 2, 3], **look), ensure_ascii=False)
        if number % 8 != 3:
            (tmp_path / name).write_text("{" if number % 8 == 5 else text, encoding="utf-8")
        jobs.append(("" if number == 4 else name, code if number % 8 != 6 else "K-999999"))
    return jobs


@pytest.mark.usefixtures("ray_local")
def test_every_reader_gives_the_same_labels_in_order(jobs: list[tuple[str, str]], tmp_path: Path) -> None:
    here = read_all_labels(tmp_path, jobs, 1)
    assert [label.problem for label in here[:8]] == ["", "", "", "missing", "missing", "broken", "other_code", ""]
    assert here[7] == Label("", (7, 1, 2, 3), 50, 60, "약 K-000007", ("642200750", "A13100741"), "x.png")
    assert (here[9].direction, here[9].attributes) == (1, (("shape", "원형"), ("colours", "하양")))
    calls: list[tuple[str, int, int]] = []
    assert read_all_labels(tmp_path, jobs, 2, lambda *call: calls.append(call), "processes") == here
    assert read_all_labels(tmp_path, jobs, 2, lambda *call: calls.append(call), "ray") == here
    assert calls.count(("labels", 40, 40)) == 2


def test_blocks_of_ray_data_hold_whole_labels(jobs: list[tuple[str, str]], tmp_path: Path) -> None:
    block = pa.table({"location": [job[0] for job in jobs], "code": [job[1] for job in jobs]})
    labels = label_reading._from_table(label_reading._read_block(block, str(tmp_path)))
    assert labels == read_all_labels(tmp_path, jobs, 1)
    assert (labels[9].direction, labels[9].attributes) == (1, (("shape", "원형"), ("colours", "하양")))
    assert labels[9].attributes is labels[17].attributes  # kept once


def test_no_jobs_start_no_workers(tmp_path: Path) -> None:
    assert read_all_labels(tmp_path, []) == []


@pytest.mark.parametrize(
    ("num_jobs", "num_workers", "address", "expected"),
    [(9, 2, "", "here"), (10, 1, "", "here"), (10, 2, "", "processes"), (10, 2, "10.0.0.1:6379", "ray")],
)
def test_automatic_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_jobs: int, num_workers: int, address: str, expected: str
) -> None:
    used = ["here"]
    monkeypatch.setattr(label_reading, "PARALLEL_FROM", 10)

    def reader(name: str) -> Callable[..., Iterator[list[Label]]]:
        def read(*_: Any) -> Iterator[list[Label]]:
            used.append(name)
            return iter(())

        return read

    monkeypatch.setattr(label_reading, "_with_processes", reader("processes"))
    monkeypatch.setattr(label_reading, "_with_ray_data", reader("ray"))
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    read_all_labels(tmp_path, [("", "K-1")] * num_jobs, num_workers)
    assert used[-1] == expected
