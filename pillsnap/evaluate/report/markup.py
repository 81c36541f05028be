"""HTML and SVG that cannot be broken out of: every string is escaped unless it was built here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_VOID = {"br", "col", "hr", "img", "input", "meta"}


class Markup(str):
    """Text that is already HTML or SVG."""

    __slots__ = ()


Content = str | int | float | None | Iterable["Content"]


def tag(name: str, *content: Content, **attributes: str | int | float | bool | None) -> Markup:
    """One element. Attribute names lose a trailing underscore, others become hyphens; None and False drop."""
    parts = [name]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(key)
        elif value is not None and value is not False:
            parts.append(f'{key}="{escape(number(value) if isinstance(value, float) else str(value))}"')
    opening = f"<{' '.join(parts)}>"
    return Markup(opening if name in _VOID else f"{opening}{join(content)}</{name}>")


def join(content: Content) -> Markup:
    """Content one after the other: strings escaped, None as nothing."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(escape(_printable(content), quote=False))
    if isinstance(content, int | float):
        return Markup(str(content))
    return Markup("".join(join(part) for part in content))


def section(name: str, title: str, *content: Content, class_: str | None = None) -> Markup:
    """A part of the page with its heading; `name` is its anchor."""
    return tag("section", tag("h2", title), *content, id=name, class_=class_)


def grid(
    headings: Sequence[str], rows: Sequence[Sequence[Content]], numeric: Sequence[int] = (), **attributes
) -> Markup:
    """A table; columns whose position is in `numeric` are aligned to the right."""
    kinds = ["n" if i in numeric else None for i in range(len(headings))]
    head = tag("tr", [tag("th", text, class_=kind, scope="col") for text, kind in zip(headings, kinds, strict=True)])
    body = [tag("tr", [tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True)]) for row in rows]
    table = tag("table", tag("thead", head) if any(headings) else None, tag("tbody", body), **attributes)
    return tag("div", table, class_="scroll")


def number(value: float) -> str:
    """A coordinate in as few characters as show on a screen."""
    return f"{value:.2f}".rstrip("0").rstrip(".") or "0"


def _printable(text: str) -> str:
    # Control characters are no valid HTML, and lone surrogates cannot be written as UTF-8.
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
