"""Reads settings from presets, configuration files, options and `--set`, in this order; the later wins."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from pillsnap.config.reference import setting_fields
from pillsnap.config.settings import Settings
from pillsnap.errors import UserError


class Entry(NamedTuple):
    """One resolved setting."""

    key: str
    value: Any
    source: str
    description: str


@dataclass(frozen=True)
class Resolved:
    """Settings, and where each value came from."""

    settings: Settings
    sources: dict[str, str]
    """Dotted key -> file name, `option` or `--set`. Keys that are not in it have their default."""

    def entries(self) -> list[Entry]:
        """Every setting with its value (as in JSON), source and meaning."""
        values = dict(_flat(self.settings.model_dump(mode="json")))
        return [
            Entry(field.key, values[field.key], self.sources.get(field.key, "default"), field.description)
            for field in setting_fields()
        ]


class _Yaml(yaml.SafeLoader):
    """YAML 1.2 scalars: on, off, yes, no, 1:4 and dates are text, and 1e-4 is a number."""


_Yaml.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def preset_names() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _presets().iterdir() if entry.name.endswith(".yaml"))


def load_settings(
    preset: str, overrides: Mapping[str, Any] | None = None, assignments: tuple[str, ...] = ()
) -> Settings:
    """The settings of a preset, with `overrides` and `assignments`. See resolve_settings."""
    return resolve_settings(preset=preset, overrides=overrides, assignments=assignments).settings


def resolve_settings(
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    assignments: tuple[str, ...] = (),
) -> Resolved:
    """Settings of a preset, of the YAML file `config` or by default, then `overrides` (dotted key -> value; None: not
    given), then `key=value` assignments.

    Raises UserError, in one line, for an unknown preset or key, a wrong type, an impossible combination, a file that
    is not YAML or extends itself.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if preset is not None:
        layers.append(_preset(preset))
    elif config is not None:
        layers += _files(Path(config))
    else:
        layers.append(("default", {"name": "unnamed"}))
    layers.append(("option", {key: value for key, value in (overrides or {}).items() if value is not None}))
    layers.append(("--set", dict(map(_assignment, assignments))))
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, layer in layers:
        for key, value in layer.items():
            _assign(values, key, value)
            sources[key] = source
    return Resolved(settings_from_dict(values), sources)


def settings_from_dict(values: Mapping[str, Any]) -> Settings:
    """Validate a nested mapping; UserError names the first key that is wrong and what it must be."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "settings"
        if first["type"] == "extra_forbidden":
            raise UserError(
                f"There is no setting {key!r}. Settings beside it: {', '.join(_siblings(first['loc']))}."
            ) from None
        message = first["msg"].removeprefix("Value error, ")
        given = "" if isinstance(first["input"], Mapping) else f" (given: {first['input']!r})"
        raise UserError(f"Setting {key}: {message}{given}.") from None


def _presets() -> Traversable:
    return resources.files("pillsnap") / "presets"


def _preset(name: str) -> tuple[str, dict[str, Any]]:
    if name not in preset_names():
        raise UserError(f"There is no preset {name!r}; choose one of {', '.join(preset_names())}.")
    file = f"{name}.yaml"
    values = _parse((_presets() / file).read_text(encoding="utf-8"), file)
    return file, dict(_flat(values))


def _files(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Layers of a configuration file: those it extends first. A file without a `name` names the run after itself."""
    layers: list[tuple[str, dict[str, Any]]] = []
    chain: list[Path] = []
    while True:
        path = path.resolve()
        if path in chain:
            circle = " -> ".join(file.name for file in (*chain[chain.index(path) :], path))
            raise UserError(f"Configuration files extend each other in a circle: {circle}.")
        chain.append(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"Cannot read the configuration file {path}: {error}.") from None
        values = {"name": path.stem} | _parse(text, str(path))
        base = values.pop("extends", None)
        layers.insert(0, (path.name, dict(_flat(values))))
        if base is None:
            return layers
        if base in preset_names():
            return [_preset(base), *layers]
        if not isinstance(base, str) or not (path.parent / base).is_file():
            raise UserError(
                f"{path} extends {base!r}, which is neither a preset ({', '.join(preset_names())}) nor a file "
                f"in {path.parent}."
            )
        path = path.parent / base


def _parse(text: str, file: str) -> dict[str, Any]:
    try:
        values = yaml.load(text, _Yaml) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{file} must map the names of settings to values, for example `train: {{seed: 7}}`.")
    return values


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _assignment(text: str) -> tuple[str, Any]:
    key, separator, raw = text.partition("=")
    if not separator:
        raise UserError(f"--set {text!r} is not of the form key=value, for example classification.lr=1e-4.")
    try:
        return key.strip(), yaml.load(raw, _Yaml)
    except yaml.YAMLError:
        return key.strip(), raw


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    node = values
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"There is no setting {key!r}: {parent!r} is a value, not a group.")
    node[last] = value


def _siblings(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Settings
    for part in location[:-1]:
        model = model.model_fields[str(part)].annotation
    return list(model.model_fields)
