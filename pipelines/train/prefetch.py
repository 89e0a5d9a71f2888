"""Fetches the batches of a training worker ahead of time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import ray.train
from ray.actor import ActorHandle

from pipelines.common.ray_errors import raise_packed
from pipelines.common.status_board import read_status_board
from pipelines.feed.loader import (
    PREFETCHED_BATCHES,
    Batch,
    ClipLoader,
    ShareOfWorker,
    load_in_process,
)
from pipelines.train import features, run_folder
from pipelines.train.job import WorkerJob
from stgt.errors import DataStallError, SettingError


class BatchPrefetcher:
    """Fetches this worker's batches in a thread, and fails if a batch does not arrive in time."""

    def __init__(
        self,
        batches: Iterator[Any],
        size: int,
        max_stall_s: float,
        board: ActorHandle | None,
        read: Callable[[Batch], Batch] | None = None,
    ) -> None:
        """Start fetching.

        Args:
            batches: This worker's batches.
            size: Number of clips of each.
            max_stall_s: Seconds that a step may wait for its batch.
            board: Status board that says what data workers are doing.
            read: Completes a batch, in the thread; None leaves batches as they are.
        """
        self._size = size
        self._read = read
        self._max_stall_s = max_stall_s
        self._board = board
        self._ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=1)
        threading.Thread(target=self._fetch, args=(batches,), daemon=True).start()

    def _fetch(self, batches: Iterator[Any]) -> None:
        try:
            for batch in batches:
                # Copied, because tensors made from read-only views would keep Ray's objects alive.
                own: Any = {name: np.array(column) for name, column in batch.items()}
                self._ready.put(own if self._read is None else self._read(own))
            self._ready.put(None)
        except Exception as error:
            self._ready.put(error)

    def next(self, step: int) -> Batch:
        """Return this worker's clips for a step.

        Raises:
            DataStallError: The clips did not arrive in time.
            STGTError: A data worker could not load the clips.
        """
        try:
            batch = self._ready.get(timeout=self._max_stall_s)
        except queue.Empty as error:
            activity = read_status_board(self._board)
            raise DataStallError(
                f"step {step} waited {self._max_stall_s:g} s for its clips ({activity}); fix what "
                "the data workers wait for or raise max_stall_s, and run the same command again"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        if batch is None or len(batch["position"]) != self._size:
            held = 0 if batch is None else len(batch["position"])
            raise RuntimeError(f"step {step}: got {held} clips, expected {self._size}")
        for error in batch["error"]:
            raise_packed(error)
        return batch


def start_prefetching(job: WorkerJob) -> BatchPrefetcher:
    """Start fetching the batches of this training worker.

    Call this before importing the model's libraries, so that data workers start meanwhile.

    Raises:
        SettingError: The global batch cannot be divided evenly among the workers.
    """
    config = job["config"]
    world = ray.train.get_context().get_world_size()
    # Checked before the first collective operation, in which unequal shares would hang.
    share, rest = divmod(config.global_batch, world)
    if rest or share % config.clips_per_block:
        raise SettingError(
            f"{world} workers cannot evenly share {config.global_batch} clips per step in blocks "
            f"of {config.clips_per_block}"
        )
    batches = _from_data_workers(share) if job["plan"] is None else _from_this_process(job, share)
    read = features.reading_tokens(config) if config.features.store else None
    return BatchPrefetcher(batches, share, config.max_stall_s, job["board"], read)


def _from_data_workers(share: int) -> Iterator[Any]:
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None
    return iter(
        shard.iter_batches(
            batch_size=share,
            batch_format="numpy",
            prefetch_batches=PREFETCHED_BATCHES,
            drop_last=True,
        )
    )


def _from_this_process(job: WorkerJob, share: int) -> Iterator[Batch]:
    """Return an iterator over batches that this process loads, from the latest checkpoint on.

    The data sets are opened when the first batch is asked for, in the prefetcher's thread, while
    the main thread imports the model's libraries.
    """
    config = job["config"]
    context = ray.train.get_context()
    mine = ShareOfWorker(context.get_world_rank(), context.get_world_size(), share)

    def batches() -> Iterator[Batch]:
        step = run_folder.latest(config.output) or 0
        loader = ClipLoader(config.loader, board=job["board"], plan=job["plan"])
        batch, block = config.global_batch, config.clips_per_block
        yield from load_in_process(loader, step * batch, config.steps * batch, block, mine)

    return batches()
