"""Finds private names of Ray in Python source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pillsnap", "jobs", "benchmarks")
OWN = Path("pillsnap/ray_compat")


def private_names(source: str, known: frozenset[str] = frozenset()) -> list[str]:
    """Private names of Ray, one entry per use: imports, attributes, keywords, and assignments to Ray's modules.

    Attributes of objects of unknown type count where the file imports Ray, unless `known` lists them as our own.
    """
    tree = ast.parse(source)
    names = dict(_ray_names(tree))
    return [text for node in ast.walk(tree) for text in _uses(node, names, known)]


def own_names(sources: list[str]) -> frozenset[str]:
    """Private names that these sources define: functions, classes, variables, fields and attributes of `self`."""
    found: set[str] = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _root(node) in ("self", "cls"):
            found.add(node.attr)
    return frozenset(name for name in found if _is_private(name))


def _ray_names(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names of what is imported from Ray, with the module or object they stand for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _is_ray(alias.name):
                    yield alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom) and _is_ray(node.module or ""):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _uses(node: ast.AST, names: dict[str, str], known: frozenset[str]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if _is_ray(alias.name) and _has_private_part(alias.name))
    elif isinstance(node, ast.ImportFrom) and _is_ray(node.module or ""):
        full = (f"{node.module}.{alias.name}" for alias in node.names)
        yield from (name for name in full if _has_private_part(name))
    elif isinstance(node, ast.Attribute):
        root = _root(node)
        if _is_private(node.attr) and (
            root in names or (names and root not in ("self", "cls") and node.attr not in known)
        ):
            yield ast.unparse(node)
        if isinstance(node.ctx, ast.Store) and _module(node.value, names):
            yield f"{ast.unparse(node)} is set"
    elif isinstance(node, ast.Call):
        if _root(node.func) in names:
            yield from (
                f"{ast.unparse(node.func)}({word.arg}=)" for word in node.keywords if _is_private(word.arg or "")
            )
        if ast.unparse(node.func) in ("setattr", "delattr") and _root(node.args[0]) in names:
            yield f"{ast.unparse(node.func)} on {ast.unparse(node.args[0])}"


def _module(node: ast.AST, names: dict[str, str]) -> bool:
    """Whether the expression is something imported from Ray, or reached from it by attributes alone."""
    return isinstance(node, ast.Name | ast.Attribute) and _root(node) in names


def _root(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _is_ray(name: str) -> bool:
    return name == "ray" or name.startswith("ray.")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _has_private_part(name: str) -> bool:
    return any(_is_private(part) for part in name.split("."))


def python_files(root: Path = ROOT) -> list[Path]:
    return sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))


def count(root: Path) -> dict[str, list[str]]:
    """Private names by file, relative to `root`."""
    files = python_files(root)
    known = own_names([file.read_text() for file in files])
    return {str(file.relative_to(root)): private_names(file.read_text(), known) for file in files}
