"""Rebuilds the feed of a run from the latest checkpoint whenever the workers start."""

from __future__ import annotations

from dataclasses import dataclass

import ray.data
from ray.actor import ActorHandle

from pipelines.feed.loader import build_feed
from pipelines.feed.plan import TrainPlan
from pipelines.train import run_folder
from pipelines.train.config import TrainConfig


@dataclass(frozen=True)
class ResumableFeed:
    """Builds the dataset for Ray Train, which calls it at every start of the worker group.

    The dataset starts at the latest complete checkpoint, which the workers load.
    """

    config: TrainConfig
    plan: TrainPlan
    board: ActorHandle | None = None

    def __call__(self) -> ray.data.Dataset:
        """Build the dataset of the remaining steps."""
        config = self.config
        step = run_folder.latest(config.output) or 0
        return build_feed(
            config.loader,
            start_position=step * config.global_batch,
            stop_position=config.steps * config.global_batch,
            block_clips=config.clips_per_block,
            num_loaders=config.num_loaders,
            board=self.board,
            plan=self.plan,
        )
