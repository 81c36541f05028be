"""`pillsnap prepare`: fill, verify or remove the decode-once store of a run."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from pillsnap.cli.options import (
    Assignments,
    Config,
    DataRoot,
    Manifest,
    Preset,
    RunDir,
    Stage,
    checked_data_root,
    chosen_settings,
    default_manifest,
)
from pillsnap.cli.terminal import progress_bar, say
from pillsnap.errors import UserError


def prepare(
    stage: Stage = None,
    preset: Preset = None,
    config: Config = None,
    data_root: DataRoot = None,
    run_dir: RunDir = None,
    manifest: Manifest = None,
    verify: Annotated[bool, typer.Option(help="Read every shard and replace damaged ones.")] = False,
    remove: Annotated[bool, typer.Option(help="Delete the run's stores.")] = False,
    assignments: Assignments = None,
) -> None:
    """Decode every photo once into a store of crops and reduced frames, which training then reads.

    Needs data.store=jpeg2x, jpeg or png. Exit code 1 when a photo could not be read.
    """
    from pillsnap.config import run_location
    from pillsnap.data.fill_store import remove_stores, room_for, store_folder

    settings = chosen_settings(stage, preset, config, {}, assignments)
    where = run_location(settings, run_dir)
    folder = store_folder(settings.data.store_dir, where)
    if remove:
        remove_stores(folder)
        say(f"removed {folder}")
        return
    if settings.data.store == "off":
        raise UserError("These settings use no store: add --set data.store=jpeg2x (small) or data.store=png (exact).")
    root = checked_data_root(data_root)
    from pillsnap.cluster.session import ray_session
    from pillsnap.data.fill_store import fill
    from pillsnap.photos.reader import PhotoReader
    from pillsnap.runs.mirror import local_run
    from pillsnap.storage import local_manifest
    from pillsnap.tasks.stores import run_stores, too_small

    reader = PhotoReader(root, settings.data.max_pixels)
    num_unreadable = 0
    directory = local_run(where)
    chosen = local_manifest(manifest or default_manifest(settings, run_dir, directory))
    stores = run_stores(settings, directory, chosen, folder)
    room = room_for([(store, samples) for _, store, samples in stores], folder, reader)
    if not room.is_enough:
        raise UserError(too_small(room))
    say(f"needs {room}")
    with ray_session():
        for name, store, samples in stores:
            if verify:
                for shard in store.shards.damaged():
                    say(f"removing {shard}: its checksum is wrong")
                    store.shards.remove(shard)
            started_s = time.monotonic()
            with progress_bar(f"preparing {name}") as progress:
                filled = fill(store, samples, reader, settings.data.decoding_cpus, progress)
            rate = filled.num_new / (time.monotonic() - started_s)
            say(
                f"{name}: {filled.num_stored:,} of {len(samples):,} samples in {filled.num_bytes / 1e9:.3f} GB, "
                f"{filled.num_new:,} of them new ({rate:.0f} per second)"
            )
            for sample_id, reason in filled.bad:
                say(f"  left out {sample_id}: {reason}")
            num_unreadable += len(filled.bad)
    say(f"store: {folder}")
    raise typer.Exit(1 if num_unreadable else 0)
