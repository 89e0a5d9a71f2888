"""Settings for the quickstart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pipelines.common.config import require
from pipelines.train.recipes import TINY_MIN_LR
from stgt.config import InitRules, OptimizerName
from stgt.field_marks import Common, Earlier, FieldMark

EARLIER_SIZES = (
    {"train_videos": 1596, "stage1_steps": 450, "stage2_steps": 80},
    {"stage1_steps": 1500},
)
"""Sizes of earlier versions, with which a folder that such a version began continues."""


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """The whole pipeline on generated videos: write, ingest, train, evaluate."""

    output: Annotated[str, Common("quickstart"), FieldMark.LOCATION] = "quickstart-output"
    """Folder for all files of the quickstart."""
    fresh: Annotated[bool, Common("quickstart")] = False
    """Delete the files of an earlier run and start over."""
    side_by_side: Annotated[bool, Common("quickstart")] = False
    """Afterwards, train a tiny ALPRO and a tiny CLIP for as many steps as stage 1, and compare them
    with STGT on one page, also on clips that are played backwards."""
    train_videos: Annotated[int, Common("quickstart")] = 2660
    """Number of training videos."""
    val_videos: Annotated[int, Common("quickstart")] = 106
    """Number of held-out videos for retrieval, each with a unique caption."""
    stage1_steps: Annotated[int, Common("quickstart")] = 1000
    """Training steps of stage 1, with hard contrastive targets."""
    stage2_steps: Annotated[int, Common("quickstart")] = 0
    """Training steps of stage 2, with self-similarity targets. 0 leaves it out, since it improves
    nothing on these clips."""
    optimizer: Annotated[OptimizerName, Common("quickstart"), Earlier("adamw")] = "muon"
    """Optimizer of stage 1; see optim.optimizer of jobs.train."""
    learning_rate: Annotated[float | None, Common("quickstart"), Earlier(None)] = 0.0012
    """Highest learning rate of stage 1, chosen for Muon. None takes that of the recipe: 0.003 with
    Muon, 0.001 with AdamW."""
    similar_captions: Annotated[int | None, Earlier(None)] = 8
    """Number of clips with similar captions that follow each other in a batch of stage 1; see
    jobs.train. None takes clips in random order."""
    matching_weight: Annotated[float, Earlier(1.0)] = 8.0
    """Factor of the matching loss in stage 1 and of the models side by side; see
    loss_weights.matching of jobs.train."""
    init_rules: Annotated[InitRules, Earlier(2)] = 3
    """Rules for initial weights; see model.init_rules of jobs.train."""
    global_batch: Annotated[int, Common("quickstart")] = 32
    """Number of clips per step, over all workers."""
    num_workers: Annotated[int, Common("quickstart")] = 2
    """Number of training workers, one CPU each."""
    seed: Annotated[int, Common("quickstart")] = 0
    """Seed for video generation, initial weights and training."""

    def __post_init__(self) -> None:
        require(self.train_videos >= 100, "train_videos", self.train_videos, "must be >= 100")
        require(self.val_videos >= 10, "val_videos", self.val_videos, "must be >= 10")
        for name in ("stage1_steps", "num_workers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(self.stage2_steps >= 0, "stage2_steps", self.stage2_steps, "must not be negative")
        require(
            self.global_batch >= 2 and self.global_batch % self.num_workers == 0,
            "global_batch",
            self.global_batch,
            f"must be at least 2 and a multiple of num_workers ({self.num_workers})",
        )
        rate = self.learning_rate
        require(
            rate is None or TINY_MIN_LR <= rate < math.inf,
            "learning_rate",
            rate,
            f"must be a finite number of at least {TINY_MIN_LR}, the rate at which the stage ends",
        )
        require(
            0 < self.matching_weight < math.inf,
            "matching_weight",
            self.matching_weight,
            "must be a finite number above 0",
        )
        similar = self.similar_captions
        require(
            similar is None or similar >= 2,
            "similar_captions",
            similar,
            "must be at least 2",
        )
        require(
            self.global_batch <= self.train_videos // 2,
            "global_batch",
            self.global_batch,
            f"must be at most half of train_videos ({self.train_videos})",
        )
