"""README.md and README.ko.md: length, the same content in both languages, files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.ko.md"]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "limit"), [("README.md", 170), ("README.ko.md", 170), ("benchmarks/README.md", 100)])
def test_length(name: str, limit: int) -> None:
    assert len(_text(name).splitlines()) <= limit


@pytest.mark.parametrize("name", READMES)
def test_eight_files_to_read_exist(name: str) -> None:
    files = re.findall(r"^\d\. \[([^\]]+)\]\(([^)]+)\):", _text(name), re.M)
    assert len(files) == 8
    for label, target in files:
        assert label == target and (ROOT / target).is_file()


def test_both_languages_link_to_the_same_files() -> None:
    """Pages that have a Korean version are linked in it."""
    english, korean = (set(re.findall(r"\]\(([^)]+)\)", _text(name))) for name in READMES)
    translated = {
        f"docs/ko/{page}" if (ROOT / "docs" / "ko" / page).exists() else f"docs/{page}"
        for page in (link.removeprefix("docs/") for link in english if link.startswith("docs/"))
    }
    others = {link for link in english if not link.startswith("docs/")} - {"README.ko.md"}
    assert korean - {"README.md"} == translated | others


def test_every_log_is_listed() -> None:
    listed = set(re.findall(r"\]\(log/(\w+\.md)\)", _text("benchmarks/README.md")))
    assert listed == {path.name for path in (ROOT / "benchmarks" / "log").glob("*.md")}


def test_the_picture_is_small() -> None:
    (picture,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", _text("README.md"))
    assert (ROOT / picture).stat().st_size <= 300_000


def test_demo_output_is_what_the_code_prints() -> None:
    """The words of the quoted lines, without their figures, are in the package."""
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "pillsnap").rglob("*.py"))
    quoted = _text("README.md").split("<!-- demo output begins -->")[1].split("<!-- demo output ends -->")[0]
    assert quoted == _text("README.ko.md").split("<!-- demo output begins -->")[1].split("<!-- demo output ends -->")[0]
    for words in (
        "data wait",
        "Classification top-1",
        "Detection mAP@0.5",
        "Total time",
        "pills correct",
        "photos all correct",
        "report: ",
    ):
        assert words in quoted and words in code, words
