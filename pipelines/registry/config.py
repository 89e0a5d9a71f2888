"""Settings for registering models."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import Positional

from pipelines.common.config import TrackingConfig, require
from stgt.field_marks import Common, FieldMark

CHALLENGER, CHAMPION = "challenger", "champion"


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """Which checkpoint to register under which name, and whether to promote it."""

    checkpoint: Annotated[Positional[str | None], Common("model"), FieldMark.LOCATION_OR_NAME] = (
        None
    )
    """Checkpoint, or the folder of a training run, which stands for its best checkpoint. Local or
    s3://. None registers nothing, which is only useful with promote."""
    name: Annotated[str, Common("model")]
    """Name of the registered model."""
    evaluation: Annotated[str | None, Common("model"), FieldMark.LOCATION_OR_NAME] = None
    """Evaluation of the checkpoint: output folder of jobs.evaluate, or id of its MLflow run. The
    model reads videos and captions as this evaluation did. None takes the latest evaluation of the
    checkpoint that MLflow has, if any."""
    license: Annotated[str | None, Common("model")] = None
    """License of the weights, for the model card. None states what the license depends on."""
    promote: Annotated[bool, Common("promotion")] = False
    """Give the alias champion to the challenger, unless it is worse than the champion or cannot be
    compared with it."""
    champion_evaluation: Annotated[str | None, Common("promotion"), FieldMark.LOCATION_OR_NAME] = (
        None
    )
    """Evaluation of the champion to compare with. None takes the one recorded when it was
    registered."""
    metric: Annotated[str, Common("promotion")] = "t2v/R1"
    """Metric that decides on a promotion. Use sim/t2v/R1 for evaluations without reranking."""
    margin: Annotated[float, Common("promotion")] = 0.0
    """How much worse the challenger may be, in units of the metric. The unfavorable end of the 95%
    interval of the difference decides."""
    resamples: Annotated[int, Common("promotion")] = 1000
    """Number of resamples for the paired bootstrap."""
    alias: Annotated[str, Common("promotion")] = CHALLENGER
    """Alias that a registered version gets, and whose version is promoted."""
    tracking: Annotated[TrackingConfig, Common("run", only=("uri", "experiment"))] = field(
        default_factory=TrackingConfig
    )
    """MLflow settings. The server must have a model registry."""

    def __post_init__(self) -> None:
        require(
            bool(self.name.strip()) and not set(self.name) & set("/:@"),
            "name",
            self.name,
            "must not be empty or contain / : @",
        )
        require(
            self.checkpoint is not None or self.promote,
            "checkpoint",
            self.checkpoint,
            "name a checkpoint to register, or use --promote for the version registered before",
        )
        require(
            re.fullmatch(r"[\w-]+", self.alias) is not None
            and re.fullmatch(r"v\d+", self.alias) is None
            and self.alias not in (CHAMPION, "latest"),
            "alias",
            self.alias,
            f"must consist of letters, digits, _ and -, and must not be {CHAMPION}, latest or "
            "a version such as v3",
        )
        require(self.margin >= 0, "margin", self.margin, "must not be negative")
        require(self.resamples >= 1, "resamples", self.resamples, "must be at least 1")
