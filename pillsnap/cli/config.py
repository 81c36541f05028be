"""`pillsnap config`: what the settings are and where they come from."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from pillsnap.cli.options import (
    Assignments,
    BatchSize,
    Config,
    Epochs,
    NumWorkers,
    Preset,
    Stage,
    Storage,
    Task,
    resolved_settings,
    training_overrides,
)
from pillsnap.cli.terminal import console

if TYPE_CHECKING:
    from pillsnap.config import Resolved

config_app = typer.Typer(no_args_is_help=True, help="Show the settings.")


@config_app.command("show")
def config_show(
    stage: Stage = None,
    preset: Preset = None,
    config: Config = None,
    storage: Storage = None,
    task: Task = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    num_workers: NumWorkers = None,
    assignments: Assignments = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print JSON: key to value, source and description.", show_default="text"),
    ] = False,
) -> None:
    """Print every setting, its value, its source and its meaning.

    The source is `default`, the file that sets it, `option` or `--set`. Without --stage, --preset and --config: the
    defaults.
    """
    overrides = training_overrides(task, epochs, batch_size, num_workers, storage)
    resolved = resolved_settings(stage, preset, config, overrides, assignments)
    if as_json:
        settings = {
            entry.key: {"value": entry.value, "source": entry.source, "description": entry.description}
            for entry in resolved.entries()
        }
        typer.echo(json.dumps(settings, ensure_ascii=False, indent=2))
    else:
        _print(resolved)


def _print(resolved: Resolved) -> None:
    from rich.padding import Padding
    from rich.text import Text

    from pillsnap.config import groups

    described = groups()
    for entry in resolved.entries():
        group = entry.key.partition(".")[0]
        if group in described:
            console.print(Text(f"\n{group}: {described.pop(group)}", "bold"))
        value = entry.value if isinstance(entry.value, str) else json.dumps(entry.value)
        style = "" if entry.source == "default" else "green"
        console.print(Text(f"{entry.key} = {value}  ({entry.source})", style), soft_wrap=True)
        console.print(Padding(Text(entry.description, "dim"), (0, 0, 0, 4), expand=False))
