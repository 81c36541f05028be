"""`pillsnap synth`: generate synthetic photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pillsnap.cli.terminal import progress_bar, say
from pillsnap.errors import UserError


def synth(
    out: Annotated[Path, typer.Option(help="Folder for the tree.")],
    classes: Annotated[int, typer.Option(min=1, help="Number of classes.")],
    singles: Annotated[int, typer.Option(min=0, help="Photos of one pill, over all classes.")],
    combinations: Annotated[int, typer.Option(min=0, help="Photos of two to four different pills.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 42,
    frame: Annotated[str, typer.Option(help="Width x height in pixels.")] = "976x1280",
    image_format: Annotated[str, typer.Option("--format", help="png or jpg.")] = "png",
    likeness: Annotated[
        str,
        typer.Option(
            help="easy: classes differ in shape and colour; shared: only in the imprint; back: only in that of the "
            "back."
        ),
    ] = "easy",
) -> None:
    """Generate synthetic pill photographs with labels in the AI Hub layout."""
    from pillsnap.synthetic import generate

    width, separator, height = frame.partition("x")
    if not (separator and width.isdecimal() and height.isdecimal()):
        raise UserError(f"--frame {frame!r} is not of the form WIDTHxHEIGHT, for example 976x1280.")
    with progress_bar("generating photos") as progress:
        tree = generate(
            out,
            num_classes=classes,
            num_singles=singles,
            num_combinations=combinations,
            seed=seed,
            frame=(int(width), int(height)),
            image_format=image_format,
            likeness=likeness,
            progress=progress,
        )
    say(f"{tree.num_photos} photos of {len(tree.codes)} classes in {out}")
