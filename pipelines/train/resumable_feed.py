"""Rebuilds the feed of a run from the latest checkpoint whenever the workers start."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import ray.data
from ray.actor import ActorHandle

from pipelines.feed.loader import build_feed
from pipelines.feed.plan import TrainPlan
from pipelines.train import run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.reserved import feed_strategy


@dataclass(frozen=True)
class ResumableFeed:
    """Builds the dataset for Ray Train, which calls it at every start of the worker group.

    The dataset starts at the latest complete checkpoint, which the workers load.
    """

    config: TrainConfig
    plan: TrainPlan
    board: ActorHandle | None = None
    reserved: bool = False
    """Whether the data workers run in the placement group of this process."""

    def __call__(self) -> ray.data.Dataset:
        """Build the dataset of the remaining steps."""
        config = self.config
        if self.reserved:
            with warnings.catch_warnings():
                # Ray Data announces that it will remove this setting, the only one for all tasks.
                warnings.simplefilter("ignore")
                ray.data.DataContext.get_current().scheduling_strategy = feed_strategy()
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
