"""Arguments that the driver passes to each training worker."""

from __future__ import annotations

from typing import TypedDict

from ray.actor import ActorHandle
from ray.util.queue import Queue

from pipelines.feed.plan import TrainPlan
from pipelines.train.config import TrainConfig


class WorkerJob(TypedDict):
    """Arguments of a training worker."""

    config: TrainConfig
    progress: Queue
    board: ActorHandle
    plan: TrainPlan | None
    """Order of the clips for workers that load clips themselves; None with data workers."""
    until: int
    """Step to stop after."""
    timeline: bool
    """Whether workers record a timeline."""
