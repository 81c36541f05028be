"""All settings as a flat list: key, type, default, limits and meaning. Read from the models of settings.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pillsnap.config.settings import Settings


@dataclass(frozen=True)
class SettingField:
    """One setting. `key` is dotted (`train.seed`), `default` is None where there is none or where it is null."""

    key: str
    default: Any
    required: bool
    description: str
    values: str
    """Type, or the allowed values, with limits: `number, >= 0 and < 1`."""


def setting_fields() -> list[SettingField]:
    """Every setting, in the order of settings.py."""
    return list(_fields(Settings, ""))


def groups() -> dict[str, str]:
    """Descriptions of the groups (`sampling`, `data`, ...), in order."""
    return {
        name: inspect.cleandoc(field.annotation.__doc__ or "")
        for name, field in Settings.model_fields.items()
        if _is_group(field)
    }


def _is_group(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _fields(model: Any, prefix: str) -> Iterator[SettingField]:
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        if _is_group(field):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            required = field.is_required()
            yield SettingField(
                key=prefix + name,
                default=None if required else model.model_construct().model_dump(mode="json")[name],
                required=required,
                description=" ".join((field.description or "").split()),
                values=_values(schema["properties"][name]),
            )


_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_LIMITS = {
    "minimum": ">= {:g}", "exclusiveMinimum": "> {:g}", "maximum": "<= {:g}", "exclusiveMaximum": "< {:g}",
    "multipleOf": "a multiple of {:g}",
}  # fmt: skip


def _values(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " or ".join(_values(part) for part in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"{value}" for value in schema["enum"])
    if schema["type"] == "array":
        return f"list of {_values(schema['items'])}"
    limits = " and ".join(text.format(schema[name]) for name, text in _LIMITS.items() if name in schema)
    return _TYPES[schema["type"]] + (f", {limits}" if limits else "")
