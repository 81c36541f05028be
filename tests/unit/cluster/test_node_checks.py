"""What a node answers, and what is made of the answers: a node that differs is named, with what differs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pillsnap.checklist import Check
from pillsnap.cluster.node_checks import Answer, Question, _marked, compare, look, require_alike
from pillsnap.errors import UserError
from pillsnap.manifest.table import read_manifest
from pillsnap.storage import Storage

HERE = Answer("head", ("a" * 64, "b" * 64), "", {"python": "3.11.7", "ray": "2.60.0", "torch": "2.15.0"})


def checks(*answers: Answer) -> dict[str, Check]:
    return {check.name: check for check in compare(HERE, answers, "/runs", "/photos")}


def test_nodes_that_see_the_same() -> None:
    found = checks(HERE, replace(HERE, node="worker1", versions=HERE.versions | {"platform": "another kernel"}))
    assert [check.ok for check in found.values()] == [True] * 3
    assert found["photos on every node"].found == "the same below /photos"
    require_alike(list(found.values()))


def test_the_node_that_differs_is_named_with_what_differs() -> None:
    found = checks(
        HERE,
        replace(HERE, node="worker1", versions=HERE.versions | {"torch": "2.14.0"}),
        replace(HERE, node="worker2", photos=("x.png: x.png is not there", "b" * 64), folder="/runs is not there"),
        replace(HERE, node="worker3", photos=("c" * 64, "b" * 64), versions={"python": "3.11.7", "torch": "2.15.0"}),
    )
    assert found["photos on every node"].found == (
        "on worker2 x.png: x.png is not there; on worker3 1 of 2 photos have other bytes than the driver's"
    )
    assert found["run directory on every node"].found == "on worker2 /runs is not there"
    assert found["packages on every node"].found == (
        "on worker1 torch 2.14.0 (the driver has 2.15.0); on worker3 ray is missing (the driver has 2.60.0)"
    )
    with pytest.raises(UserError, match=r"^photos on every node: on worker2 .*: mount the same photos .*worker1 torch"):
        require_alike(list(found.values()))


def test_what_a_node_sees(toy_manifest: Path, toy_tree: Path, tmp_path: Path) -> None:
    paths = tuple(read_manifest(toy_manifest)["image_path"].to_pylist()[:2])
    (tmp_path / "marker").touch()
    question = Question(str(toy_tree), paths, str(tmp_path), "marker")
    own = look(question)
    assert own.folder == "" and all(len(digest) == 64 for digest in own.photos)
    assert own.versions["ray"]
    copy = Path(shutil.copytree(toy_tree, tmp_path / "copy"))
    (copy / paths[0]).unlink()
    (copy / paths[1]).write_bytes(b"another photo")
    other = look(replace(question, data_root=str(copy), folder=str(tmp_path / "nothing")))
    assert other.photos[0].startswith(f"{paths[0]}: ") and "not there" in other.photos[0]
    assert len(other.photos[1]) == 64 and other.photos[1] != own.photos[1]
    assert other.folder == f"{tmp_path / 'nothing'} is not there"
    assert look(replace(question, folder=str(copy))).folder == f"{copy} is another folder than the driver's"


def test_storage_instead_of_a_folder(s3_environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    question = Question("/photos", (), f"{s3_environment}/runs/one", "")
    with _marked(question.folder) as (folder, marker):
        marked = replace(question, folder=folder, marker=marker)
        assert look(marked).folder == ""
        other = f"{s3_environment}/runs/two"
        assert look(replace(marked, folder=other)).folder == f"{other} is another folder than the driver's"
    assert Storage(question.folder).files() == {}
    assert "NO_SUCH_BUCKET" in look(replace(question, folder="s3://no-such-bucket/runs")).folder
    with _marked("s3://no-such-bucket/runs") as (_, marker):
        assert marker == ""
