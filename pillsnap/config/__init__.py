"""Typed, frozen settings: the only place where presets, configuration files, `--set` and flags are read.

In: the name of a preset or a YAML file, and overrides. Out: `Settings`, with the source of every value.
Read first: settings.py, which has every setting with its meaning.
"""

from pillsnap.config.load import Resolved, load_settings, preset_names, resolve_settings, settings_from_dict
from pillsnap.config.location import run_directory, run_location
from pillsnap.config.reference import SettingField, groups, setting_fields
from pillsnap.config.settings import (
    TASKS,
    ClassificationSettings,
    DataSettings,
    DetectionSettings,
    Settings,
    TrainSettings,
)

__all__ = [
    "TASKS",
    "ClassificationSettings",
    "DataSettings",
    "DetectionSettings",
    "Resolved",
    "SettingField",
    "Settings",
    "TrainSettings",
    "groups",
    "load_settings",
    "preset_names",
    "resolve_settings",
    "run_directory",
    "run_location",
    "setting_fields",
    "settings_from_dict",
]
