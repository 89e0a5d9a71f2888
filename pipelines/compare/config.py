"""Settings of a comparison of evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field

from tyro.conf import Positional

from pipelines.common.config import TrackingConfig, require


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Evaluations side by side."""

    runs: Positional[tuple[str, ...]]
    """Evaluations: output folders of jobs.evaluate, or ids of their runs in MLflow. The others are
    compared with the first."""
    output: str | None = None
    """Folder for a report (compare.html) and its values; None only prints."""
    resamples: int = 1000
    """Resamples of the paired bootstrap."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where runs were recorded."""

    def __post_init__(self) -> None:
        require(len(self.runs) >= 1, "runs", self.runs, "name at least one evaluation")
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")
