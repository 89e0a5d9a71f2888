"""Settings for comparing evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional

from pipelines.common.config import TrackingConfig, require
from stgt.field_marks import Common, FieldMark


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Which evaluations to compare, and how."""

    runs: Annotated[Positional[tuple[str, ...]], Common("evaluations"), FieldMark.LOCATION_OR_NAME]
    """Evaluations to compare: output folders of jobs.evaluate or MLflow run ids. All others are
    compared with the first."""
    output: Annotated[str | None, Common("evaluations"), FieldMark.LOCATION] = None
    """Folder for the report (compare.html) and its values as JSON. None only prints the results."""
    resamples: Annotated[int, Common("evaluations")] = 1000
    """Number of resamples for the paired bootstrap."""
    tracking: Annotated[TrackingConfig, Common("run", only=("uri", "experiment"))] = field(
        default_factory=TrackingConfig
    )
    """MLflow settings used to look up run ids."""

    def __post_init__(self) -> None:
        require(len(self.runs) >= 1, "runs", self.runs, "must name at least one evaluation")
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")
