"""Published figures of GPUs, from which the time of a step on another card is reckoned."""

from __future__ import annotations

from dataclasses import dataclass

from pillsnap.errors import UserError


@dataclass(frozen=True)
class Card:
    """A GPU's data sheet: dense bfloat16 arithmetic and memory bandwidth."""

    tflops: float
    bandwidth_gb_s: float


CARDS = {
    "H100": Card(989, 3350),
    "H200": Card(989, 4800),
    "A100": Card(312, 2039),
    "RTX 5080": Card(113, 960),
}


def card_of(device: str) -> str:
    """The card that a device's name contains. Raises UserError when its figures are not known."""
    found = next((name for name in CARDS if name.lower() in device.lower()), None)
    if found is None:
        raise UserError(f"There are no published figures of {device!r}: name one of {', '.join(CARDS)}.")
    return found


def speed_ratios(there: str, here: str) -> tuple[float, float]:
    """Speed of the card `there` as a multiple of that of `here`: the lower and the higher of the ratios of arithmetic
    and of bandwidth. A step lies between the two.
    """
    one, other = CARDS[there], CARDS[here]
    slow, fast = sorted((one.tflops / other.tflops, one.bandwidth_gb_s / other.bandwidth_gb_s))
    return slow, fast
