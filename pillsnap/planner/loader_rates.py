"""Measures the loader of a task on this machine, on a manifest's photos or on generated ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pillsnap.config import Settings
from pillsnap.planner.measure import LoaderRates, measure_loader
from pillsnap.runs.directory import Run
from pillsnap.storage import is_uri

_SAMPLE_PHOTOS, _SAMPLE_CLASSES = 48, 12
_STORED_SAMPLES = 128


def sample_run(settings: Settings, folder: Path) -> Run:
    """A run over a few generated photos of AI Hub's size, to measure the loader without a manifest."""
    from pillsnap.manifest.build import build_manifest
    from pillsnap.manifest.table import read_classes, read_manifest
    from pillsnap.synthetic import generate

    combinations = _SAMPLE_PHOTOS // 8
    generate(
        folder / "photos", num_classes=_SAMPLE_CLASSES, num_singles=_SAMPLE_PHOTOS - combinations,
        num_combinations=combinations,
    )  # fmt: skip
    path = build_manifest(folder / "photos", folder / "manifest", num_photos=None, num_classes=None).path
    return Run(folder, settings, read_manifest(path), "", read_classes(path.parent), str(folder / "photos"), "plan")


def read_run(settings: Settings, where: str, manifest: Path, data_root: str) -> Run:
    """The run that training would open at `where`, a folder or URI; writes nothing. Raises UserError when the manifest
    cannot be read.
    """
    from pillsnap.manifest.table import manifest_hash, read_classes, read_manifest

    classes = read_classes(manifest if manifest.is_dir() else manifest.parent)
    table, uri = read_manifest(manifest), where if is_uri(where) else ""
    return Run(Path(where), settings, table, manifest_hash(manifest), classes, data_root, "plan", uri)


def with_whole_epochs(settings: Settings) -> Settings:
    """The settings with epochs and validations of all samples. A loader's rate does not depend on their sizes."""
    whole = {"samples_per_epoch": None, "validation_samples": None, "validate_every": 1}
    detection = settings.detection.model_copy(update=whole | {"combination_share": None})
    classification = settings.classification.model_copy(update=whole)
    return settings.model_copy(update={"detection": detection, "classification": classification})


def measure_task_loader(run: Run, name: str, seconds: float, folder: Path) -> LoaderRates:
    """Rates of a task's stream, the same as in training, with a store of its own in `folder`. Ray must be initialised.

    From photos: nothing is in that store, and nothing is added. From the store: with windows of some of the samples.
    """
    from pillsnap.data.fill_store import fill, split_stores
    from pillsnap.photos.reader import PhotoReader
    from pillsnap.tasks.registry import make_task
    from pillsnap.train.trainer import make_stream

    data = run.settings.data.model_copy(update={"store_dir": str(folder)})
    run = replace(run, settings=with_whole_epochs(run.settings).model_copy(update={"data": data}))
    task = make_task(name, run.settings, run.codes)
    samples = task.samples(run.manifest, None)
    recipe = task.recipe(samples)
    wanted = 64 * task.settings.batch_size

    def rate(train: pa.Table) -> float:
        # Small tables are repeated, so that the measurement does not run out of batches.
        many = pa.concat_tables([train] * max(1, -(-wanted // max(len(train), 1))))
        stream = make_stream(run, name, replace(samples, train=many), recipe, read_only=True)
        return measure_loader(stream, seconds, data, run.settings.train.cpus_per_worker)

    direct = rate(samples.train)
    if data.store == "off":
        return LoaderRates(direct, direct)
    number = len(samples.train)
    few = samples.train.take(np.linspace(0, number - 1, min(number, _STORED_SAMPLES)).astype(int))
    store = split_stores(str(folder), name, recipe, data.store, run.manifest_hash)["train"]
    fill(store, few, PhotoReader(run.data_root, data.max_pixels), data.decoding_cpus)
    return LoaderRates(direct, rate(few))
