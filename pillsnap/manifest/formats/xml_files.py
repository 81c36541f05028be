"""Parses XML label files: no document types and entities, so that a small file stays small."""

from __future__ import annotations

from xml.etree import ElementTree

from pillsnap.errors import UserError
from pillsnap.manifest.formats.folder import Folder


def read_xml(folder: Folder, path: str) -> ElementTree.Element:
    """The root element. Raises UserError for other files."""
    data = (folder.root / path).read_bytes()
    if b"<!" in data.replace(b"<!--", b"").replace(b"<![CDATA[", b"") or b"\0" in data:
        raise UserError(f"{folder.root / path}: has a document type or is not UTF-8: label files have neither")
    try:
        return ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise UserError(f"{folder.root / path}: not XML ({error})") from error


def root_tag(folder: Folder, path: str) -> str:
    """Name of the root element, or ""."""
    try:
        return read_xml(folder, path).tag
    except UserError:
        return ""


def text_of(element: ElementTree.Element, name: str) -> str:
    """Text of a child without outer blanks, or ""."""
    return (element.findtext(name) or "").strip()
