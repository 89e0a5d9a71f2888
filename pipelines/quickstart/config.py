"""Settings of the quickstart."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.common.config import require


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """The whole way on generated videos: write, ingest, train in two stages, evaluate."""

    output: str = "quickstart-output"
    """Folder for everything the quickstart makes."""
    fresh: bool = False
    """Delete what an earlier run left and start over."""
    train_videos: int = 1596
    """Videos to train on."""
    val_videos: int = 106
    """Unseen videos to search in, each with its own caption."""
    stage1_steps: int = 450
    """Steps with hard contrastive targets."""
    stage2_steps: int = 80
    """Steps with self-similarity targets."""
    global_batch: int = 32
    """Clips per step."""
    num_workers: int = 2
    """Training workers, one CPU each."""
    seed: int = 0
    """Seed of everything."""

    def __post_init__(self) -> None:
        require(self.train_videos >= 100, "train_videos", self.train_videos, "must be >= 100")
        require(self.val_videos >= 10, "val_videos", self.val_videos, "must be >= 10")
        for name in ("stage1_steps", "stage2_steps", "num_workers"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(
            self.global_batch >= 2 and self.global_batch % self.num_workers == 0,
            "global_batch",
            self.global_batch,
            f"must be a multiple of num_workers ({self.num_workers}), and at least 2",
        )
        require(
            self.global_batch <= self.train_videos // 2,
            "global_batch",
            self.global_batch,
            f"must be at most half of train_videos ({self.train_videos})",
        )
