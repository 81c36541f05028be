"""Batches as encoded windows: packed in a Ray Data task, decoded and augmented by processes of the train worker.

Pixels are ten times the bytes of their JPEGs, and are written and read several times on their way through the object
store. With other nodes to decode, tasks that hand over pixels are faster.

Of a window that lies in a store which the worker reads too, not even the bytes travel: the row says that it is there.
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
    """Slots by number as one row: the windows' bytes on end, where each ends, their places, which the worker has to
    fetch from the store, and the bad photos.

    `fetch` gives the window of one of a slot's samples, None for one that the store has.
    """
    windows = [fetch(slot, member) for slot in slots.values() for member in slot.members.tolist()]
    sent = [window for window in windows if isinstance(window, EncodedWindow)]
    bad = {row: (window.reason, window.detail) for row, window in enumerate(windows) if isinstance(window, BadImage)}
    return {
        "slots": np.array(list(slots), np.int64),
        "data": np.frombuffer(b"".join(window.data for window in sent), np.uint8),
        "ends": np.cumsum([len(window.data) for window in sent], dtype=np.int64),
        "places": np.array([(w.left, w.top, w.scale_x, w.scale_y, w.own) for w in sent], np.float64).reshape(-1, 5),
        "stored": np.array([window is None for window in windows], bool),
        "bad": json.dumps(bad, ensure_ascii=False),
    }


def unpack(row: Row) -> Iterator[EncodedWindow | BadImage | None]:
    bad = {int(place): BadImage(*why) for place, why in json.loads(str(row["bad"][0])).items()}
    data, ends = row["data"][0].data, row["ends"][0].tolist()
    sent = zip([0, *ends], ends, row["places"][0].tolist(), strict=False)
    for place, stored in enumerate(row["stored"][0].tolist()):
        if stored:
            yield None
        elif place in bad:
            yield bad[place]
        else:
            begin, end, (left, top, scale_x, scale_y, own) = next(sent)
            yield EncodedWindow(bytes(data[begin:end]), left, top, scale_x, scale_y, bool(own))


def as_row(values: Mapping[str, Any]) -> Row:
    """The row that holds these."""
    return {name: np.asarray(value)[None] for name, value in values.items()}


def stack(batches: Sequence[Batch], images: np.ndarray) -> Row:
    """The row that holds these batches, whose images (n, capacity, size, size, 3) lie together already."""
    others = {name: np.stack([batch[name] for batch in batches]) for name in batches[0] if name != "image"}
    return as_row(others | {"image": images})


def unstack(row: Row) -> Iterator[Batch]:
    """The batches of a stacked row, in order: views."""
    (images,) = row["image"]  # a second row would be lost
    for number in range(len(images)):
        yield {name: value[0, number, ...] for name, value in row.items()}
