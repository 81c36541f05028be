"""Rows of Ray Data: batches as encoded windows (pack, unpack) or as pixels (stack, unstack).

Encoded windows are packed in a Ray Data task, and decoded and augmented by decode workers. They are a tenth of the
bytes of pixels, which are copied several times on their way through the object store. With other nodes that decode,
sending pixels is faster. A window in a store that the worker can read is sent as a flag, not as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pillsnap.data.plan import Slot
from pillsnap.data.recipes import Batch, Row
from pillsnap.data.windows import EncodedWindow
from pillsnap.photos.decode import BadImage


def pack(slots: Mapping[int, Slot], fetch: Callable[[Slot, int], EncodedWindow | BadImage | None]) -> dict[str, Any]:
    """One row from slots by number; `fetch` gives the window of a slot's sample, or None for one in the store.

    `slots` (n,) numbers; `data` the concatenated bytes of the sent windows, `ends` where each ends, `geometry` (m, 5)
    their left, top, scale_x, scale_y, own; per window `stored`, whether the store has it; `bad` JSON {window index:
    [reason, detail]}.
    """
    windows = [fetch(slot, member) for slot in slots.values() for member in slot.members.tolist()]
    sent = [window for window in windows if isinstance(window, EncodedWindow)]
    bad = {row: (window.reason, window.detail) for row, window in enumerate(windows) if isinstance(window, BadImage)}
    return {
        "slots": np.array(list(slots), np.int64),
        "data": np.frombuffer(b"".join(window.data for window in sent), np.uint8),
        "ends": np.cumsum([len(window.data) for window in sent], dtype=np.int64),
        "geometry": np.array([(w.left, w.top, w.scale_x, w.scale_y, w.own) for w in sent], np.float64).reshape(-1, 5),
        "stored": np.array([window is None for window in windows], bool),
        "bad": json.dumps(bad, ensure_ascii=False),
    }


def unpack(row: Row) -> Iterator[EncodedWindow | BadImage | None]:
    """The windows of a packed row, slot by slot; None for one in the store."""
    bad = {int(index): BadImage(*why) for index, why in json.loads(str(row["bad"][0])).items()}
    data, ends = row["data"][0].data, row["ends"][0].tolist()
    sent = zip([0, *ends], ends, row["geometry"][0].tolist(), strict=False)
    for index, stored in enumerate(row["stored"][0].tolist()):
        if stored:
            yield None
        elif index in bad:
            yield bad[index]
        else:
            begin, end, (left, top, scale_x, scale_y, own) = next(sent)
            yield EncodedWindow(bytes(data[begin:end]), left, top, scale_x, scale_y, bool(own))


def as_row(values: Mapping[str, Any]) -> Row:
    """Values by name as one row of Ray Data: behind a first axis of length 1."""
    return {name: np.asarray(value)[None] for name, value in values.items()}


def stack(batches: Sequence[Batch], images: np.ndarray) -> Row:
    """One row of batches; `images` (n, capacity, size, size, 3) are the images of all of them."""
    others = {name: np.stack([batch[name] for batch in batches]) for name in batches[0] if name != "image"}
    return as_row(others | {"image": images})


def unstack(row: Row) -> Iterator[Batch]:
    """The batches of a stacked row, in order, as views."""
    (images,) = row["image"]  # exactly one row
    for number in range(len(images)):
        yield {name: value[0, number, ...] for name, value in row.items()}
