"""Settings of a sweep over trainings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipelines.common.config import require
from pipelines.train.config import TrainConfig
from stgt.field_marks import Common, FieldMark


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Search over learning rates and graph thresholds. Each trial is a Ray Train run."""

    train: Annotated[
        TrainConfig,
        Common(
            "training",
            only=(
                "data",
                "val_store",
                "vocab",
                "init_from",
                "steps",
                "global_batch",
                "num_workers",
                "tracking",
            ),
        ),
    ]
    """Settings that all trials share. Trials are compared on val_store, or on held-out clips."""
    output: Annotated[str, Common("sweep")]
    """Output folder of the sweep. Running the same command again resumes the sweep."""
    name: str = "sweep"
    """Name of the parent run in MLflow."""
    lr: Annotated[tuple[float, ...], Common("sweep")] = (3e-4, 1e-3)
    """Learning rates to try."""
    similarity_threshold: Annotated[tuple[float, ...], Common("sweep")] = (0.5, 0.95)
    """Similarity thresholds of the graph to try."""
    metric: Annotated[str, Common("sweep")] = "val/t2v/R10"
    """Metric to maximize, as reported at checkpoints."""
    max_concurrent_trials: Annotated[int, Common("sweep"), FieldMark.OPERATIONAL] = 1
    """Maximum number of trials that run at the same time."""
    grace_steps: Annotated[int, Common("sweep")] = 1
    """Minimum number of steps before ASHA may stop a trial."""
    reduction_factor: Annotated[int, Common("sweep")] = 2
    """Reduction factor of ASHA: at each rung, one in this many trials continues."""

    def __post_init__(self) -> None:
        require(
            self.train.val_store is not None or self.train.hold_out > 0,
            "train.val_store",
            None,
            "a sweep compares trials on validation clips; set train.val_store or train.hold_out",
        )
        for name in ("max_concurrent_trials", "grace_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(
            self.reduction_factor >= 2,
            "reduction_factor",
            self.reduction_factor,
            "must be at least 2",
        )
        require(len(self.lr) > 0, "lr", self.lr, "give at least one learning rate")
        require(
            len(self.similarity_threshold) > 0,
            "similarity_threshold",
            self.similarity_threshold,
            "give at least one threshold",
        )
