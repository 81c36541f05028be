"""`pillsnap prepare`: fill, verify or remove the decode-once store of a run."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pillsnap.cli.options import (
    Assignments,
    DataRoot,
    Manifest,
    Preset,
    RunDir,
    Stage,
    checked_data_root,
    chosen_settings,
    console,
    default_manifest,
    progress_bar,
)
from pillsnap.errors import UserError


def prepare(
    stage: Stage = None,
    preset: Preset = None,
    data_root: DataRoot = None,
    run_dir: RunDir = None,
    manifest: Manifest = None,
    verify: Annotated[bool, typer.Option(help="Read every shard, and make damaged ones anew.")] = False,
    remove: Annotated[bool, typer.Option(help="Delete the run's stores instead.")] = False,
    assignments: Assignments = None,
) -> None:
    """Decode every photo once: crops and reduced frames go into a store that training reads instead of the photos."""
    from pillsnap.config import run_location
    from pillsnap.data.fill_store import remove_stores, store_folder

    settings = chosen_settings(stage, preset, {}, assignments)
    where = run_location(settings, run_dir)
    folder = store_folder(settings.data.store_dir, where)
    if remove:
        remove_stores(folder)
        console.print(f"removed {folder}", highlight=False, soft_wrap=True)
        return
    if settings.data.store == "off":
        raise UserError("These settings use no store: add --set data.store=jpeg (small) or data.store=png (exact).")
    root = checked_data_root(data_root)
    from pillsnap.cluster.session import ray_session
    from pillsnap.data.fill_store import fill
    from pillsnap.photos.reader import PhotoReader
    from pillsnap.runs.mirror import local_run
    from pillsnap.storage import local_manifest
    from pillsnap.tasks.stores import run_stores

    reader = PhotoReader(root, settings.data.max_pixels)
    bad = 0
    directory = local_run(where)
    chosen = local_manifest(manifest or default_manifest(settings, run_dir, directory))
    stores = run_stores(settings, directory, chosen, folder)
    with ray_session():
        for name, store, samples in stores:
            if verify:
                for shard in store.shards.damaged():
                    console.print(f"removing {shard}: its content is not what was written", soft_wrap=True)
                    store.shards.remove(shard)
            started_s = time.monotonic()
            with progress_bar(f"preparing {name}") as progress:
                filled = fill(store, samples, reader, settings.data.decoding_cpus, progress)
            rate = filled.num_new / (time.monotonic() - started_s)
            console.print(
                f"{name}: {filled.num_stored:,} of {len(samples):,} samples in {filled.num_bytes / 1e9:.3f} GB, "
                f"{filled.num_new:,} of them new ({rate:.0f} a second)",
                highlight=False,
                soft_wrap=True,
            )
            for sample_id, reason in filled.bad:
                console.print(f"  left out {sample_id}: {reason}", markup=False, highlight=False, soft_wrap=True)
            bad += len(filled.bad)
    console.print(f"store: {folder}", highlight=False, soft_wrap=True)
    raise typer.Exit(1 if bad else 0)
