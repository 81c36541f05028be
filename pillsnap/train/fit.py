"""One task as a Ray Train run: the stream, the workers, and the signals that end them in order."""

from __future__ import annotations

import shutil
import signal
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from pillsnap.data.batches import PhotoReader
from pillsnap.data.plan import StreamPlan
from pillsnap.data.samples import TaskSamples
from pillsnap.data.stream import Recipe, Stream, execution_options, share_samples
from pillsnap.errors import UserError
from pillsnap.observe.logs import current_level
from pillsnap.observe.versions import versions
from pillsnap.train.checkpoint import find_checkpoint
from pillsnap.train.run_directory import STOP_FILE, Run
from pillsnap.train.worker import STREAM, WorkerConfig, run_worker

if TYPE_CHECKING:
    import ray
    from ray.train.torch import TorchTrainer


# On a CPU every step allocates and frees the same large tensors: keeping them in the process saves a quarter of the
# step,
# which glibc otherwise spends on handing pages back and faulting them in again.
_KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "MALLOC_TOP_PAD_": str(2**28)}


def make_trainer(
    run: Run, name: str, stream: Stream, num_workers: int, use_gpu: bool, started_at_s: float
) -> TorchTrainer:
    """Ray Train's trainer for one task; `started_at_s` is the unix time at which the task began."""
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    train = run.settings.train
    meta = {
        "task": name,
        "config": run.settings.model_dump(mode="json"),
        "codes": run.codes,
        "manifest_hash": run.manifest_hash,
        "run_id": run.run_id,
        "versions": versions(),
    }
    worker = WorkerConfig(name, run.settings, run.codes, str(run.run_dir), meta, stream, started_at_s, current_level())
    resources = {"CPU": train.cpus_per_worker} | ({"GPU": 1} if use_gpu else {})
    return TorchTrainer(
        run_worker,
        train_loop_config=worker,
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            # Ray Train takes up an earlier run of the same name; the checkpoints that count are ours, so each start
            # has its own.
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(run.run_dir / "ray"),
            failure_config=FailureConfig(max_failures=train.max_failures),
            worker_runtime_env={} if use_gpu else {"env_vars": _KEEP_FREED_MEMORY},
        ),
        datasets={STREAM: StreamFromCheckpoint(stream, run.checkpoint_dir(name))},
        dataset_config=DataConfig(execution_options=execution_options()),
    )


@dataclass(frozen=True)
class StreamFromCheckpoint:
    """Called at every start of the workers: the stream from where the last checkpoint stands."""

    stream: Stream
    folder: Path

    def __call__(self) -> ray.data.Dataset:
        last, _ = find_checkpoint(self.folder)
        if last is None:
            return self.stream.dataset()
        return self.stream.dataset(self.stream.plan.first_slot(last.position.epoch, last.position.epoch_step))


def make_stream(run: Run, name: str, samples: TaskSamples, recipe: Recipe, num_workers: int) -> Stream:
    """The stream of one task, its samples shared with every Ray Data task."""
    settings = getattr(run.settings, name)
    return Stream(
        plan=StreamPlan(
            seed=run.settings.train.seed,
            epochs=settings.epochs,
            num_train=len(samples.train),
            num_val=len(samples.val),
            batch_size=settings.batch_size,
            num_workers=num_workers,
        ),
        recipe=recipe,
        reader=PhotoReader(run.data_root, run.settings.data.max_pixels),
        train_samples=share_samples(samples.train),
        val_samples=share_samples(samples.val),
        batches_per_read=run.settings.data.batches_per_read,
        decoding_cpus=run.settings.data.decoding_cpus,
    )


def fit(trainer: TorchTrainer, run_dir: Path) -> None:
    """Train in a thread of its own, so that this one hears signals: the first asks for a checkpoint and an end, a
    second insists.
    """
    failure: list[BaseException] = []

    def run_trainer() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run_trainer, name="train", daemon=True)

    def ask_to_stop(signum: int, _: FrameType | None) -> None:
        if (run_dir / STOP_FILE).exists():
            raise KeyboardInterrupt
        (run_dir / STOP_FILE).write_text(signal.Signals(signum).name)

    before = {signum: signal.signal(signum, ask_to_stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        thread.start()
        while thread.is_alive():
            thread.join(timeout=0.2)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        shutil.rmtree(run_dir / "ray", ignore_errors=True)
    if failure:
        raise _as_user_error(failure[0]) from failure[0]


def _as_user_error(error: BaseException) -> Exception:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last: Any = lines[-1] if lines else type(error).__name__
    return UserError(f"Training failed: {last}")
