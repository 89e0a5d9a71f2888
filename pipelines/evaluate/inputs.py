"""The inputs of an evaluation, and the files in its output folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.common import storage
from pipelines.evaluate.benchmarks import Benchmark
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.gallery import Gallery

METRICS = "metrics.json"
RANKS = "ranks.parquet"
REPORT = "report.html"
PICTURE = "retrieval.png"
RUN = "mlflow_run.json"
PAIRS = "pairs"


@dataclass(frozen=True)
class EvaluationInputs:
    """Everything that an evaluation works on."""

    config: EvaluateConfig
    benchmark: Benchmark
    gallery: Gallery
    model: dict[str, Any]
    """The model's config, as read from the checkpoint."""

    @property
    def embeddings(self) -> str:
        """Folder of the embeddings."""
        return self.config.embeddings or storage.join(self.config.output, "embeddings")

    @property
    def pairs(self) -> str:
        """Folder of the matched pairs."""
        return storage.join(self.config.output, PAIRS)

    @property
    def num_frames(self) -> int:
        """Number of frames per clip."""
        return self.config.num_frames or int(self.model["num_frames"])
