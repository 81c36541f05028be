"""`pillsnap enrol`: new drugs without a new training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pillsnap.cli.options import AttributeFile, NamedRun, named_run, uri_of
from pillsnap.cli.terminal import console, say
from pillsnap.errors import UserError


def enrol(
    run_dir: NamedRun,
    code: Annotated[str | None, typer.Argument(help="Code of the new drug.", show_default="none")] = None,
    photos: Annotated[
        list[str] | None, typer.Argument(help="1 to 10 photos of it, or folders of them.", show_default="none")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the drug.", show_default="none")] = "",
    attributes: AttributeFile = None,
    crops: Annotated[
        bool, typer.Option("--crops", help="The photos show the pill alone, cut out.", show_default="off")
    ] = False,
    max_loss: Annotated[
        float,
        typer.Option(min=0, max=1, help="Largest share of the validation crops that all enrolled drugs may take away."),
    ] = 0.005,
    remove: Annotated[str | None, typer.Option(help="Remove this enrolled drug.", show_default="none")] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List the enrolled drugs.", show_default="off")] = False,
) -> None:
    """Add a drug that was not trained to a run from 1 to 10 photos, each of exactly one pill.

    predict, evaluate and export know it from then on. Use photos of both sides.
    """
    from pillsnap.evaluate.enrol import enrol_drug, remove_drug
    from pillsnap.evaluate.predict import list_photos
    from pillsnap.manifest.attribute_table import add_attributes, read_attribute_table
    from pillsnap.manifest.table import ClassInfo
    from pillsnap.runs.directory import load_run, only_driver
    from pillsnap.runs.driver_lock import driving
    from pillsnap.runs.enrolled import read_enrolled
    from pillsnap.runs.mirror import local_run

    if [code is not None, remove is not None, list_all].count(True) != 1:
        raise UserError("Give a code and its photos, --remove CODE, or --list.")
    where = named_run(run_dir)
    if list_all:
        enrolled = read_enrolled(load_run(local_run(where), uri=uri_of(where)).run_dir)
        for info in enrolled.classes if enrolled else []:
            say(f"{info.code}  {info.num_train} photos  {info.name}".rstrip())
        return
    files = list_photos([Path(photo) for photo in photos or []]) if code is not None else []
    with driving(where, say) as directory:
        run = load_run(directory, uri=uri_of(where))
        with only_driver(directory):
            if code is None:
                assert remove is not None
                remove_drug(run, remove)
                say(f"{remove} is no longer enrolled")
                return
            info = ClassInfo(code, 0, name)
            if attributes:
                (info,), notes = add_attributes([info], read_attribute_table(attributes))
                for note in notes:
                    say(note)
            with console.status(f"enrolling {code}"):
                result = enrol_drug(run, info, files, crops=crops, max_loss=max_loss)
    say(
        f"{code} is enrolled from {result.num_photos} photos; of {result.num_crops:,} validation crops of trained "
        f"drugs {100 * result.after:.2f} % are named right, {100 * result.before:.2f} % without enrolled drugs"
    )
    if result.lowered:
        say(f"the logits of all enrolled drugs are lowered by {result.lowered:.2f} to keep --max-loss")
