"""Settings of a sweep over trainings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pipelines.common.config import require
from pipelines.train.config import TrainConfig
from stgt.field_marks import Common, FieldMark


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search over learning rate and graph threshold, each trial a Ray Train run."""

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
    """What every trial starts from; it needs a val_store, by which trials are compared."""
    output: Annotated[str, Common("sweep")]
    """Folder of the sweep."""
    name: str = "sweep"
    """Name of the parent run in MLflow."""
    lr: Annotated[tuple[float, ...], Common("sweep")] = (3e-4, 1e-3)
    """Learning rates to try."""
    similarity_threshold: Annotated[tuple[float, ...], Common("sweep")] = (0.5, 0.95)
    """Graph thresholds to try."""
    metric: Annotated[str, Common("sweep")] = "val/t2v/R10"
    """What is maximised, a metric reported at checkpoints."""
    max_concurrent_trials: Annotated[int, Common("sweep"), FieldMark.OPERATIONAL] = 1
    """Trials that run at a time."""
    grace_steps: Annotated[int, Common("sweep")] = 1
    """Steps a trial is granted before ASHA may stop it."""
    reduction_factor: Annotated[int, Common("sweep")] = 2
    """ASHA keeps one in so many at each rung."""

    def __post_init__(self) -> None:
        require(
            self.train.val_store is not None or self.train.hold_out > 0,
            "train.val_store",
            None,
            "is needed by a sweep, or train.hold_out",
        )
        for name in ("max_concurrent_trials", "grace_steps"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        require(
            self.reduction_factor >= 2, "reduction_factor", self.reduction_factor, "must be >= 2"
        )
        require(len(self.lr) > 0, "lr", self.lr, "name at least one learning rate")
        require(
            len(self.similarity_threshold) > 0,
            "similarity_threshold",
            self.similarity_threshold,
            "name at least one threshold",
        )
