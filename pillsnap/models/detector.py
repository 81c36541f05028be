"""The YOLO detector with one class, pill: images (n, 3, s, s) -> boxes; its loss and its export.

All use of ultralytics' models is here. ultralytics reads the environment and the process rank at import, so functions
import it, after `quiet_ultralytics`.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pillsnap.caches import private_folder
from pillsnap.errors import UserError
from pillsnap.models.precision import as_built, without_autocast
from pillsnap.processes import added_variables

MAX_DETECTIONS = 300
_MIN_SCORE = 0.001
_PUBLISHED = {
    "yolo11n.pt": "0ebbc80d4a7680d14987a577cd21342b65ecfd94632bd9a8da63ae6417644ee1",
    "yolo11s.pt": "85a76fe86dd8afe384648546b56a7a78580c7cb7b404fc595f97969322d502d5",
    "yolo11m.pt": "d5ffc1a674953a08e11a8d21e022781b1b23a19b730afc309290bd9fb5305b95",
}
"""SHA-256 of files of ultralytics' release v8.4.0. Other weights are fetched unverified, and read like any file."""


def quiet_ultralytics() -> None:
    """Import ultralytics, and keep it from unpickling and evaluating, installing packages, writing to the home folder,
    and asking the network while it is imported (20 s where the name server does not answer).

    Call before another import of it.
    """
    os.environ["ULTRALYTICS_SAFE_LOAD"] = "1"
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own, which its kernel alone can import, ends matplotlib's import
    os.environ.setdefault("YOLO_AUTOINSTALL", "False")
    os.environ.setdefault("YOLO_VERBOSE", "False")
    if "YOLO_CONFIG_DIR" not in os.environ:
        os.environ["YOLO_CONFIG_DIR"] = str(private_folder("ultralytics"))
    os.makedirs(os.environ["YOLO_CONFIG_DIR"], exist_ok=True)
    with added_variables({"YOLO_OFFLINE": "1"}):  # only here: after a failed download it would forbid to try again
        import ultralytics.utils  # noqa: F401


def build_detector(
    model: str,
    weights: str,
    *,
    box_gain: float,
    cls_gain: float,
    dfl_gain: float,
    epochs: int = 1,
    notes: list[str] | None = None,
) -> nn.Module:
    """A `DetectionModel` with one class; `model` is a name such as yolo11m, or the path of a model file. `epochs`:
    over which an end-to-end head moves its loss from many boxes per pill to one.

    `weights`: `pretrained` fetches `<model>.pt` from ultralytics' hub, `random` gives untrained weights, anything
    else is a local file; `notes` gets a line when they fit in part. Raises UserError when the model is unknown or the
    weights cannot be loaded or fit in less than half. Neither a model file nor weights can run code.
    """
    quiet_ultralytics()
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel
    from ultralytics.utils import DEFAULT_CFG, SETTINGS

    from pillsnap.models.precise_head import make_head_precise

    if SETTINGS.get("sync"):
        SETTINGS.update(sync=False)
    config = model if model.endswith((".yaml", ".yml")) else f"{model}.yaml"
    try:
        detector = DetectionModel(_architecture(config), ch=3, nc=1, verbose=False)
    except FileNotFoundError:
        raise UserError(
            f"There is no detection model {model!r}: name one of ultralytics', such as yolo11n or yolo11m, "
            "or a model file by its path, such as ./my.yaml."
        ) from None
    except Exception as error:  # whatever a file's content makes ultralytics raise
        raise UserError(f"The detection model {model!r} cannot be built ({_reason(error)}): name another.") from error
    detector.names = {0: "pill"}
    detector.args = get_cfg(
        DEFAULT_CFG,
        {"box": box_gain, "cls": cls_gain, "dfl": dfl_gain, "epochs": epochs, "task": "detect", "model": config},
    )
    if weights != "random":
        fetch = weights == "pretrained"
        note = _load_weights(detector, f"{model}.pt" if fetch else weights, fetch)
        if note and notes is not None:
            notes.append(note)
    for name, parameter in detector.named_parameters():
        parameter.requires_grad = ".dfl" not in name  # fixed integration weights
    make_head_precise(detector.model[-1])
    return detector


def detection_loss(
    detector: Any, images: torch.Tensor, boxes: torch.Tensor, num_boxes: torch.Tensor, epoch: int = 0,
    unsure: torch.Tensor | None = None, valid: torch.Tensor | None = None, head_weights: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Box, class and distribution-focal loss per image, gains applied.

    `images`: (n, 3, s, s) in 0 to 1; `boxes`: (n, m, 4) x, y, w, h in pixels of the image; `num_boxes`: (n,). `epoch`
    counts from 0 and matters to end-to-end heads only. In the areas `unsure` (n, k, 4) x, y, w, h unassigned anchors
    have no class loss; a model gets `unsure` always or never. Loss and gradient are those of the images `valid` (n,)
    bool; 0 without any. The others share in batch normalisation only, and keep the shape for which the detector is
    compiled. `head_weights` (h,): factor on the loss of each head, see `score_sums`. Computed in float32, also under
    autocast.
    The sum of the three, times n, is the loss of ultralytics' own trainer.
    """
    predictions = detector(images)
    if getattr(detector, "criterion", None) is None:
        detector.criterion = _criterion(detector, images.device, unsure is not None)
        for head in _heads(detector.criterion):
            head.assigner.register_forward_hook(_keep_scores)
    if hasattr(detector.criterion, "update"):  # set, not counted, so that a resumed run continues correctly
        detector.criterion.updates = epoch - 1
        detector.criterion.update()
        if head_weights is not None:
            detector.criterion.o2m *= head_weights[0]
            detector.criterion.o2o *= head_weights[1]
    if valid is not None:
        num_boxes = num_boxes * valid
    for head in _heads(detector.criterion):
        # ultralytics multiplies the class loss (n, anchors, classes) by these; images without boxes have no other loss.
        head.class_weights = None if valid is None else valid[:, None, None]
    batch = _batch(detector.criterion, images.shape[-1], boxes, num_boxes)
    if unsure is not None:
        batch["unsure"] = unsure
    with without_autocast(images.device):
        total, _ = detector.criterion(predictions, batch)
    if head_weights is not None and len(head_weights) == 1:
        total = total * head_weights
    return dict(zip(("box", "cls", "dfl"), total / len(images), strict=True))


def score_sums(detector: Any) -> torch.Tensor:
    """(h,) sum of the scores that the last `detection_loss` assigned to anchors, per head: an end-to-end model has two.

    ultralytics divides the loss of a head by this sum, or by 1 where it is smaller.
    """
    return torch.stack([head.assigner.scores.sum() for head in _heads(detector.criterion)])


def _heads(criterion: Any) -> list[Any]:
    return [criterion.one2many, criterion.one2one] if hasattr(criterion, "one2many") else [criterion]


def _keep_scores(assigner: Any, _: Any, assigned: tuple[torch.Tensor, ...]) -> None:
    assigner.scores = assigned[2]


def _criterion(detector: Any, device: torch.device, marked: bool) -> Any:
    if device.type != "cuda" and not marked:
        return detector.init_criterion()
    from pillsnap.models.dense_loss import dense_criterion

    return dense_criterion(detector)


def _batch(criterion: Any, size_px: int, boxes: torch.Tensor, num_boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    from pillsnap.models.dense_loss import is_dense

    if is_dense(criterion):
        return {"boxes": boxes, "num_boxes": num_boxes}
    rows = torch.arange(boxes.shape[1], device=boxes.device) < num_boxes[:, None]
    image_index, _ = rows.nonzero(as_tuple=True)
    chosen = boxes[rows]
    centres = torch.cat([chosen[:, :2] + chosen[:, 2:] / 2, chosen[:, 2:]], dim=1) / size_px
    return {"batch_idx": image_index, "cls": torch.zeros(len(image_index), 1, device=boxes.device), "bboxes": centres}


@torch.inference_mode()
def detect(detector: Any, images: torch.Tensor, *, nms_iou: float, min_score: float = _MIN_SCORE) -> list[np.ndarray]:
    """Boxes per image, best first: (k, 5) float32 arrays of x, y, w, h in pixels of the image, and score.

    `images`: (n, 3, s, s) in 0 to 1. The detector must be in eval mode.
    """
    quiet_ultralytics()
    from ultralytics.utils.nms import non_max_suppression

    output = detector(images)
    end_to_end = is_end_to_end(detector)
    # Its default time limit drops detections silently on slow machines.
    kept = non_max_suppression(
        output, min_score, nms_iou, nc=1, max_det=MAX_DETECTIONS, end2end=end_to_end, max_time_img=60.0
    )
    found = []
    for rows in kept:
        rows = rows.float().cpu().numpy()
        boxes = np.concatenate([rows[:, :2], rows[:, 2:4] - rows[:, :2], rows[:, 4:5]], axis=1)
        found.append(boxes[np.argsort(-boxes[:, 4], kind="stable")].astype(np.float32))
    return found


def is_end_to_end(detector: Any) -> bool:
    """Whether its head chooses one box per pill, without non-maximum suppression."""
    return bool(getattr(detector.model[-1], "end2end", False))


def export_for_ultralytics(detector: Any, path: Path, train_args: dict[str, Any]) -> None:
    """Write a file that `ultralytics.YOLO(path)` loads: the model in single precision, without its loss."""
    import copy

    quiet_ultralytics()
    import ultralytics

    model: Any = as_built(copy.deepcopy(detector)).cpu().float().eval()
    model.criterion = None
    partial = path.with_suffix(".partial")
    known = {
        "task": "detect",
        "imgsz": train_args["image_size_px"],
        "batch": train_args["batch_size"],
        "epochs": train_args["epochs"],
    }
    torch.save(
        {"model": model, "ema": None, "epoch": -1, "train_args": known, "version": ultralytics.__version__}, partial
    )
    os.replace(partial, path)


def read_exported(path: Path) -> nn.Module:
    """The detector of an exported file, read without running its code. Raises whatever a damaged file makes ultralytics
    raise.
    """
    quiet_ultralytics()
    from ultralytics.nn.tasks import DetectionModel, torch_safe_load

    with _plainly_named(path) as name:
        contents, _ = torch_safe_load(name, safe_only=True)  # also where ultralytics was imported before
    model = contents.get("ema") or contents.get("model")
    if not isinstance(model, DetectionModel):
        raise TypeError(f"{path} holds no detector")
    return model.float().eval()


@contextmanager
def _plainly_named(path: Path) -> Iterator[str]:
    """A link to the file: ultralytics drops quotes from a path and takes a question mark for the end of a URL. Raises
    OSError when the file cannot be read.
    """
    path.open("rb").close()
    with tempfile.TemporaryDirectory(prefix="pillsnap-weights-") as folder:
        link = Path(folder, "weights.pt")
        link.symlink_to(path.absolute())
        yield str(link)


def _architecture(config: str) -> dict[str, Any]:
    """The model file of a path, or of a name among those that ultralytics ships: it would prefer one in the working
    directory. Raises FileNotFoundError.
    """
    import ultralytics
    from ultralytics.nn import tasks
    from ultralytics.utils import YAML

    if os.sep in config:
        if not tasks.SAFE_LOAD:
            raise ImportError("ultralytics was imported before, without ULTRALYTICS_SAFE_LOAD=1")
        return tasks.yaml_model_load(Path(config).resolve(strict=True))
    shipped = {path.name: path for path in Path(ultralytics.__file__).parent.glob("cfg/models/*/*.yaml")}
    scaled = re.sub(r"(\d+)([nslmx])(.+)?$", r"\1\3", config)  # one file for all scales: yolo11m.yaml -> yolo11.yaml
    path = shipped.get(config) or shipped.get(scaled)
    if path is None:
        raise FileNotFoundError(config)
    return YAML.load(path) | {"scale": tasks.guess_model_scale(config), "yaml_file": config}


def _load_weights(detector: Any, source: str, fetch: bool) -> str:
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    if not fetch and not os.path.exists(source):
        if source not in GITHUB_ASSETS_NAMES:
            raise UserError(
                f"The detection weights {source!r} are not there: "
                "set detection.weights to a file, 'pretrained' or 'random'."
            )
        fetch = True
    try:
        trained = read_exported(_fetched(source) if fetch else Path(source))
    except (UserError, PermissionError):
        raise
    except Exception as error:  # download layers raise anything
        advice = (
            "connect to the network once, set detection.weights to a local file, or to 'random' for untrained weights"
            if fetch else "it is damaged, or no ultralytics model"
        )  # fmt: skip
        raise UserError(f"The detection weights {source!r} cannot be loaded ({_reason(error)}): {advice}.") from error
    detector.load(trained, verbose=False)
    given = {name: tensor.shape for name, tensor in trained.state_dict().items()}
    own = detector.state_dict()
    left = [name for name, tensor in own.items() if given.get(name) != tensor.shape]
    found = f"{source} fits {len(own) - len(left)} of {len(own)} tensors"
    if 2 * len(left) > len(own):
        raise UserError(f"The detection weights {found} of the model: they are those of another model.")
    return f"{found}; new ones are {', '.join(left[:3])}{' …' if len(left) > 3 else ''}" if left else ""


def _fetched(name: str) -> Path:
    """This user's copy of weights that ultralytics publishes. Raises UserError when it is not the published file."""
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES, attempt_download_asset

    if name not in GITHUB_ASSETS_NAMES:
        raise FileNotFoundError(f"ultralytics publishes no {name}")
    folder = private_folder("weights")
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            os.replace(attempt_download_asset(os.path.join(partial, name)), folder / name)
    found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if found != _PUBLISHED.get(name, found):
        (folder / name).unlink()
        raise UserError(
            f"The detection weights {name} are not those that ultralytics published (sha256 {found[:12]}, not "
            f"{_PUBLISHED[name][:12]}); the copy was deleted: try again, or set detection.weights to a local file."
        )
    return folder / name


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
