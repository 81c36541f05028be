"""The READMEs against the code: every command and option exists, every module is in the tree, both languages agree."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from pillsnap.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
READMES = ["README.md", "README.ko.md"]
FOLDERS = ["pillsnap", "jobs", "deploy", "docs"]


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def _block(name: str, section: str) -> str:
    return _text(name).split(f"<!-- {section} begins -->")[1].split(f"<!-- {section} ends -->")[0]


def _without(name: str, *sections: str) -> str:
    text = _text(name)
    for section in sections:
        before, rest = text.split(f"<!-- {section} begins -->")
        text = before + rest.split(f"<!-- {section} ends -->")[1]
    return text


def _commands(name: str) -> list[str]:
    """Command lines of the README that call `pillsnap`, in code fences and inline, without comments."""
    text = _without(name, "demo output", "tree").replace("\\\n", " ")
    fenced = re.findall(r"^(pillsnap [^#\n]+)", text, re.M)
    return [line.strip() for line in fenced + re.findall(r"`(pillsnap [^`]+)`", text)]


def _subcommands(command: Any) -> dict[str, Any]:
    return getattr(command, "commands", {})


def _resolve(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the words call, and the words left for it."""
    command: Any = typer.main.get_command(app)
    while words and words[0] in _subcommands(command):
        command, words = _subcommands(command)[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("name", READMES)
def test_every_command_of_the_readme_parses(name: str) -> None:
    lines = _commands(name)
    assert len(lines) >= 7
    for line in lines:
        command, words = _resolve(shlex.split(line)[1:])
        assert not _subcommands(command), f"{line}: there is no such command"
        command.make_context("pillsnap", words, resilient_parsing="--help" in words).close()


@pytest.mark.parametrize("name", READMES)
def test_every_option_of_the_readme_exists(name: str) -> None:
    known = {"--help"}
    stack: list[Any] = [typer.main.get_command(app)]
    while stack:
        command = stack.pop()
        known |= {option for parameter in command.params for option in parameter.opts}
        stack += _subcommands(command).values()
    lines = [line for line in _text(name).splitlines() if "ray " not in line and "docker " not in line]
    mentioned = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", "\n".join(lines)))
    assert mentioned - {"--address", "--working-dir", "--runtime-env"} <= known


@pytest.mark.parametrize("name", READMES)
def test_every_file_of_the_package_is_in_the_tree(name: str) -> None:
    tree = _block(name, "tree")
    listed = set(re.findall(r"^ *(\S+)", tree, re.M))
    folders = {"presets/", "synthetic/", "static/"}  # listed as a whole
    files = {
        path.name
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
        and path.name not in ("__init__.py", "py.typed")
        and "__pycache__" not in path.parts
        and not any(part + "/" in folders for part in path.parts)
    }
    assert files - listed == set()
    named = {entry.rstrip("/") for entry in listed if entry[:1].isalpha() and re.search(r"\.\w+$|/$", entry)}
    there = {path.name for path in ROOT.iterdir()}
    there |= {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
    assert named - there == set()


def test_both_languages_show_the_same_code() -> None:
    """Fences hold the same commands (comments may be translated) and the same demo output."""

    def code(name: str) -> list[str]:
        fences = re.findall(r"^```.*?\n(.*?)^```", _without(name, "tree"), re.M | re.S)
        return [re.sub(r"\s+#.*", "", line) for fence in fences for line in fence.splitlines()]

    english, korean = (code(name) for name in READMES)
    assert english == korean
    assert _block("README.md", "demo output") == _block("README.ko.md", "demo output")


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "docs/architecture.md"])
def test_links_lead_to_files(name: str) -> None:
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)#]+)\)", _text(name)):
        if not target.startswith("https://"):
            assert (folder / target).exists(), f"{name} links to {target}"
