"""Where a run is stored: --run, train.storage and the name of the run decide."""

from __future__ import annotations

from pathlib import Path

from pillsnap.config.settings import Settings
from pillsnap.errors import UserError
from pillsnap.storage import check_uri, folder_of, is_uri, join, plain


def run_location(settings: Settings, run: str | Path | None) -> str:
    """Folder or URI of a run: `run` if it is a URI, else the folder of that name in train.storage.

    Raises UserError when the two disagree.
    """
    storage = plain(settings.train.storage or "").rstrip("/")
    run = None if run is None else plain(str(run))
    if run is not None and is_uri(run):
        check_uri(run)
        if storage and folder_of(run) != storage:
            raise UserError(f"--run {run} is not in train.storage {storage}: give one of them.")
        return run.rstrip("/")
    if not storage:
        return str(run_directory(settings, None if run is None else Path(run)))
    name = settings.name if run is None else Path(run).absolute().name
    if is_uri(storage):
        check_uri(storage)
        return join(storage, name)
    return str(Path(storage, name).absolute())


def run_directory(settings: Settings, run: Path | None) -> Path:
    """The run directory: `run`, or `artifacts/<name>`."""
    return (run or Path("artifacts") / settings.name).absolute()
