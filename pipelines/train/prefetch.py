"""Batches of a training worker, fetched ahead by a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.train
from ray.actor import ActorHandle

from pipelines.common.ray_errors import raise_packed
from pipelines.common.status_board import read_status_board
from pipelines.feed.loader import PREFETCHED_BATCHES, Batch
from pipelines.train.job import WorkerJob
from stgt.errors import DataStallError


class BatchPrefetcher:
    """Batches of this worker, fetched ahead by a thread; one that does not come is an error."""

    def __init__(
        self, batches: Iterator[Any], size: int, max_stall_s: float, board: ActorHandle | None
    ) -> None:
        self._size = size
        self._max_stall_s = max_stall_s
        self._board = board
        self._ready: queue.Queue[Batch | Exception | None] = queue.Queue(maxsize=1)
        threading.Thread(target=self._fetch, args=(batches,), daemon=True).start()

    def _fetch(self, batches: Iterator[Any]) -> None:
        try:
            for batch in batches:
                # Read-only views of Ray's object store would be kept alive by what comes of them.
                self._ready.put({name: np.array(column) for name, column in batch.items()})  # type: ignore[arg-type]
            self._ready.put(None)
        except Exception as error:
            self._ready.put(error)

    def next(self, step: int) -> Batch:
        """The clips of this worker for a step.

        Raises:
            DataStallError: they did not come in time.
            STGTError: a data worker could not load them.
        """
        try:
            batch = self._ready.get(timeout=self._max_stall_s)
        except queue.Empty as error:
            activity = read_status_board(self._board)
            raise DataStallError(
                f"step {step} waited {self._max_stall_s:g} s for its clips ({activity}); mend what "
                "they wait for, or raise max_stall_s, and run the same command again"
            ) from error
        if isinstance(batch, Exception):
            raise batch
        if batch is None or len(batch["position"]) != self._size:
            held = 0 if batch is None else len(batch["position"])
            raise RuntimeError(f"step {step}: {held} clips came, {self._size} were due")
        for error in batch["error"]:
            raise_packed(error)
        return batch


def start_prefetching(job: WorkerJob) -> BatchPrefetcher:
    """Start fetching the batches of this training worker.

    Called before the model's libraries are imported: data workers then start at the same time.

    Raises:
        ValueError: the workers cannot share a global batch.
    """
    config = job["config"]
    world = ray.train.get_context().get_world_size()
    # Checked before the first collective: a rank with another share would keep the others waiting.
    share, rest = divmod(config.global_batch, world)
    if rest or share % config.clips_per_block:
        raise ValueError(
            f"{world} workers cannot share {config.global_batch} clips per step in blocks of "
            f"{config.clips_per_block}"
        )
    shard = ray.train.get_dataset_shard("train")
    assert shard is not None
    batches = shard.iter_batches(
        batch_size=share,
        batch_format="numpy",
        prefetch_batches=PREFETCHED_BATCHES,
        drop_last=True,
    )
    return BatchPrefetcher(iter(batches), share, config.max_stall_s, job["board"])
