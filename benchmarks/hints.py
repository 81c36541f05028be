"""What do hints and a list of possible codes gain, and what does a wrong hint cost?

    python -m benchmarks.hints FILE.npz [FILE.npz ...] [--wrong 0.1] [--allowed 20]

Each file has logits of validation crops of generated classes of which only the imprint tells six apart, as
`benchmarks.unknown` keeps them. Each crop gets the hints that a person would give of its pill: its shape, a colour, the
imprint of one side. A wrong hint is that of another class, drawn at random. Prints top-1 for each set of hints, alone
and with the list of codes, which has the right one and others drawn at random.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pillsnap.metrics.calibration import best_temperature, temperature_facts
from pillsnap.metrics.evidence import gather, known_values
from pillsnap.synthetic.catalog import Pill, build_catalog

HINTS = ((), ("shape",), ("colour",), ("imprint",), ("shape", "colour"), ("shape", "imprint"), ("colour", "imprint"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--wrong", type=float, default=0.1, help="share of wrong hints")
    parser.add_argument("--allowed", type=int, default=20, help="codes of the list")
    parser.add_argument("--classes", type=int, default=200)
    options = parser.parse_args()
    catalog = {pill.code: pill for pill in build_catalog(42, options.classes, "shared")}
    files = [dict(np.load(file)) for file in options.files]
    for names in HINTS:
        for wrong in (0.0, options.wrong) if names else (0.0,):
            found = [top1(arrays, catalog, names, wrong, options.allowed) for arrays in files]
            print(
                json.dumps({"hints": names, "wrong": wrong, "top1": found, "mean": np.mean(found, 0).round(4).tolist()})
            )


def top1(
    arrays: dict[str, np.ndarray], catalog: dict[str, Pill], names: tuple[str, ...], wrong: float, num_allowed: int
) -> list[float]:
    """Top-1 among all codes, and among `num_allowed`."""
    classes = [{"code": code, "attributes": _attributes(catalog[code])} for code in arrays["codes"].tolist()]
    facts = temperature_facts(*(torch.from_numpy(arrays[f"val_{name}"]) for name in ("logits", "labels")))
    logits = arrays["val_logits"].astype(np.float64) / best_temperature(facts.numpy())
    rng = np.random.default_rng(0)

    @cache
    def ratios(hint: str) -> np.ndarray:
        return gather(classes, hints=[hint]).log_ratios

    right = np.zeros((len(logits), 2), bool)
    for number, label in enumerate(arrays["val_labels"].tolist()):
        total = logits[number].copy()
        others = [index for index in range(len(classes)) if index != label]
        for name in names:
            shown = classes[int(rng.choice(others)) if rng.random() < wrong else label]
            total += ratios(f"{name}={rng.choice(known_values(shown['attributes'], name))}")
        allowed = [label, *rng.permutation(others)[: num_allowed - 1]]
        right[number] = total.argmax() == label, allowed[int(total[allowed].argmax())] == label
    return right.mean(0).round(4).tolist()


def _attributes(pill: Pill) -> dict[str, Any]:
    colours = [colour for colour in (pill.look.colour, pill.look.second_colour) if colour]
    front, back = pill.prints
    return {"shape": pill.look.shape, "colours": colours, "imprint_front": front, "imprint_back": back}


if __name__ == "__main__":
    main()
