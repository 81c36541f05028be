"""What every node of a cluster sees: the photos, the run directory, the packages; a node that differs is named."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from pillsnap.checklist import Check
from pillsnap.config import Settings
from pillsnap.errors import UserError
from pillsnap.observe.versions import versions
from pillsnap.photos.decode import DEFAULT_MAX_PIXELS, BadImage
from pillsnap.photos.files import PhotoStore
from pillsnap.storage import Storage, StorageError, is_uri

ANSWER_TIMEOUT_S = 60.0
NUM_PHOTOS = 5
_MAY_DIFFER = ("platform",)


@dataclass(frozen=True)
class Question:
    """What each node is to look at."""

    data_root: str
    photos: tuple[str, ...]
    """Locations of a few photos."""
    folder: str
    """The run directory, or the nearest folder above it that exists, or the run's URI."""
    marker: str
    """Name of a file that the driver has just written there; empty where it could not."""
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class Answer:
    """What one node found."""

    node: str
    photos: tuple[str, ...]
    """Of each photo the SHA-256 of its bytes, or why it cannot be read."""
    folder: str
    """What is wrong with the run directory; empty when nothing is."""
    versions: dict[str, str] = field(default_factory=dict)


def look(question: Question) -> Answer:
    """What this node sees. Raises nothing that a missing or forbidden file causes: it is the answer."""
    store = PhotoStore(question.data_root, question.max_pixels)
    return Answer(
        socket.gethostname(),
        tuple(_digest(store, path) for path in question.photos),
        _folder_problem(question.folder, question.marker),
        versions(),
    )


def node_checks(settings: Settings, run: str | Path, data_root: str, manifest: pa.Table | None) -> list[Check]:
    """Compare what all nodes of Ray's cluster see with what this process sees; nothing for a single node.

    `run` is the run's folder or URI. Each reads a few photos of the manifest. Ray must be up.
    """
    import ray

    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    if len(nodes) < 2:
        return []
    photos: list[str] = []
    if manifest is not None:
        few = range(0, len(manifest), max(1, len(manifest) // NUM_PHOTOS))[:NUM_PHOTOS]
        photos = manifest["location"].take(list(few)).to_pylist()
    with _marked(str(run)) as (folder, marker):
        question = Question(data_root, tuple(photos), folder, marker, settings.data.max_pixels)
        answers, silent = _ask(question, nodes)
        own = look(question)
    has = ray.cluster_resources()
    there = Check(
        "nodes",
        not silent,
        f"{len(answers)} of {len(nodes)} answer"
        + (f", not {', '.join(silent)}" if silent else f"; {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"),
        "look at `ray status` and at the logs of that node's raylet",
    )
    return [there, *compare(own, answers, folder, data_root)]


def compare(own: Answer, answers: Sequence[Answer], folder: str, data_root: str) -> list[Check]:
    """One check a question; each names the nodes at fault."""
    return [
        _verdict(
            "photos on every node", answers, lambda answer: _photo_problem(own, answer), f"the same below {data_root}",
            "mount the same photos there, under the same path",
        ),
        _verdict(
            "run directory on every node", answers, lambda answer: answer.folder, f"{folder} is one folder for all",
            "give that node the same AWS_* variables" if is_uri(folder) else
            "mount it there, under the same path, with the right to write",
        ),
        _verdict(
            "packages on every node", answers, lambda answer: _version_problem(own, answer), "the same versions",
            "run `make install` of the same commit there, or use the same image",
        ),
    ]  # fmt: skip


def require_alike(checks: Sequence[Check]) -> None:
    """Raise UserError, which names the nodes, when a check failed."""
    failed = [f"{check.name}: {check.found}: {check.advice}." for check in checks if check.ok is False]
    if failed:
        raise UserError(" ".join(failed))


def _ask(question: Question, nodes: dict[str, str]) -> tuple[list[Answer], list[str]]:
    """The nodes' answers, and the names of those that gave none in time."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(question): name
        for node, name in nodes.items()
    }
    answers, silent = [], []
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_TIMEOUT_S)
    for reference in ready:
        try:
            answers.append(ray.get(reference))
        except ray.exceptions.RayError as error:  # the node died, or its environment cannot be made
            silent.append(f"{asked[reference]} ({_last_line(error)})")
    return sorted(answers, key=lambda answer: answer.node), sorted(silent + [asked[reference] for reference in late])


@contextmanager
def _marked(run: str) -> Iterator[tuple[str, str]]:
    """The run directory, or the nearest that exists above it, or the run's URI, with a file in it by which others know
    it again.
    """
    if is_uri(run):
        marker = f".pillsnap-preflight-{uuid.uuid4().hex[:8]}"
        try:
            Storage(run).write(marker, b"here")
        except StorageError:  # no right to write: each node says so of itself
            marker = ""
        yield run, marker
        if marker:
            Storage(run).remove(marker)
        return
    folder = Path(run)
    while not folder.exists():
        folder = folder.parent
    with ExitStack() as stack:
        marker = ""
        with suppress(OSError):  # no right to write: each node says so of itself
            file = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".pillsnap-preflight-"))
            marker = os.path.basename(file.name)
        yield str(folder), marker


def _folder_problem(folder: str, marker: str) -> str:
    if is_uri(folder):
        return storage_problem(folder, marker)
    if not os.path.isdir(folder):
        return f"{folder} is not there"
    if marker and not os.path.exists(os.path.join(folder, marker)):
        return f"{folder} is another folder than the driver's"
    return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written to"


def storage_problem(uri: str, marker: str = "") -> str:
    """Why this node cannot keep a run there, or does not see the driver's file `marker`; empty when it can."""
    own = f".pillsnap-preflight-{uuid.uuid4().hex[:8]}"
    try:
        storage = Storage(uri)
        if marker and storage.read(marker) is None:
            return f"{uri} is another folder than the driver's"
        storage.write(own, b"here")
        storage.remove(own)
    except UserError as error:
        return str(error)
    return ""


def _digest(store: PhotoStore, path: str) -> str:
    try:
        return hashlib.sha256(store.read(path)).hexdigest()
    except (BadImage, UserError, OSError) as error:
        return f"{path}: {error}"


def _photo_problem(own: Answer, answer: Answer) -> str:
    wrong = [there for here, there in zip(own.photos, answer.photos, strict=True) if here != there]
    if not wrong:
        return ""
    unreadable = next((text for text in wrong if ":" in text), "")
    return unreadable or f"{len(wrong)} of {len(own.photos)} photos have other bytes than the driver's"


def _version_problem(own: Answer, answer: Answer) -> str:
    names = sorted({*own.versions, *answer.versions} - {*_MAY_DIFFER})
    return ", ".join(
        f"{name} {answer.versions.get(name, 'is missing')} (the driver has {own.versions.get(name, 'none')})"
        for name in names
        if own.versions.get(name) != answer.versions.get(name)
    )


def _verdict(
    name: str, answers: Sequence[Answer], problem: Callable[[Answer], str], good: str, advice: str
) -> Check:  # fmt: skip
    problems = [f"on {answer.node} {text}" for answer in answers if (text := problem(answer))]
    return Check(name, not problems, "; ".join(problems) or good, advice)


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
