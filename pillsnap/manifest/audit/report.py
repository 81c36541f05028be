"""Findings of an audit, and their report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

Severity = Literal["error", "warning"]
_LISTED = 1000
_SHOWN = 3


@dataclass(frozen=True)
class Finding:
    """`count` rows, photos or classes with one problem; `examples`: the first 1,000. Errors make a manifest unfit."""

    kind: str
    severity: Severity
    message: str
    count: int
    examples: list[str]


def finding(kind: str, severity: Severity, message: str, items: Sequence[str]) -> Iterator[Finding]:
    """One finding if there are items, else none."""
    if items:
        yield Finding(kind, severity, message, len(items), list(items[:_LISTED]))


@dataclass(frozen=True)
class AuditReport:
    """All findings of an audit, errors first. `fit` is False if any finding is an error."""

    manifest: str
    manifest_hash: str
    deep: bool
    num_photos: int
    num_train: int
    num_val: int
    num_classes: int
    findings: list[Finding] = field(default_factory=list)

    @property
    def fit(self) -> bool:
        return not any(found.severity == "error" for found in self.findings)

    def to_dict(self) -> dict:
        """For JSON."""
        return {"schema_version": 1, "fit": self.fit, **asdict(self)}

    def print_summary(self, console: Console) -> None:
        """Print the findings and the result."""
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=f"{self.num_photos} photos: {self.num_train} train, {self.num_val} val, {self.num_classes} classes"
        )
        for column in ("", "finding", "count", "meaning", "examples"):
            table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
        for found in self.findings:
            style = "red" if found.severity == "error" else "yellow"
            shown = "\n".join(found.examples[:_SHOWN]) + ("\n…" if found.count > _SHOWN else "")
            cells = (found.severity, found.kind, str(found.count), found.message, shown)
            table.add_row(*(Text(cell, style=style if i == 0 else "") for i, cell in enumerate(cells)))
        if self.findings:
            console.print(table)
        depth = (
            "every photo decoded" if self.deep else "headers only; --deep decodes every photo and finds near-duplicates"
        )
        result = "[green]fit to train on[/green]" if self.fit else "[red]not fit to train on[/red]"
        console.print(f"{result} ({depth})")
