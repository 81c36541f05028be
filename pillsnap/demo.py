"""The whole system at toy size: generated photos, both models, evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from pillsnap.config import Settings, load_settings
from pillsnap.manifest.build import build_manifest
from pillsnap.observe.logs import setup_logging
from pillsnap.synthetic import generate

_CLASSES, _SINGLES, _COMBINATIONS = 8, 192, 72
_FRAME = (488, 640)


def run_demo(run_dir: Path, console: Console) -> dict[str, Any]:
    """Generate photos, train and evaluate; return the metrics. Continues an unfinished demo."""
    from pillsnap.runs.directory import CONFIG_FILE, open_run
    from pillsnap.train.driver import train_and_evaluate

    settings: Settings = load_settings("demo")
    photos = run_dir / "photos"
    if not (run_dir / "manifest.parquet").exists():
        total = _SINGLES + _COMBINATIONS
        console.print(f"generating {total} photos of {_CLASSES} classes that differ in shape and colour")
        generate(photos, num_classes=_CLASSES, num_singles=_SINGLES, num_combinations=_COMBINATIONS, frame=_FRAME)
        build_manifest(photos, run_dir, seed=settings.train.seed, **settings.sampling.model_dump())
    is_started = (run_dir / CONFIG_FILE).exists()
    run, notes = open_run(run_dir, settings, run_dir, photos, resume=is_started)
    setup_logging(run_dir)
    for note in notes:
        console.out(note, highlight=False)
    return train_and_evaluate(run, console)
