"""Settings of an evaluation of answers. `jobs.evaluate` documents and fills them."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.artifacts.answer_benchmarks import (
    ANSWER_BENCHMARKS,
    AnswerBenchmark,
)
from pipelines.common.config import TrackingConfig
from pipelines.feed.config import FrameRules, Resize
from stgt.config import Precision

SHOWN_ANSWERS = 5
"""Number of most probable answers that are kept for each question."""


@dataclass(frozen=True, kw_only=True)
class AnswersConfig:
    """Which model answers which questions about which clips."""

    benchmark: str
    """`msrvtt_qa`, `msvd_qa`, or `any` for questions of any number."""
    data: str
    """Clip store, the folder above it, or a manifest whose videos are decoded on the fly."""
    checkpoint: str
    """Checkpoint of a model that was trained with questions, or the folder of its training."""
    questions: str
    """Manifest with the questions."""
    answers: str | None = None
    """Answer vocabulary; None uses the one in the checkpoint."""
    output: str
    """Folder for the answers, the metrics and the report."""
    name: str | None = None
    """Name of the MLflow run; None uses the name of the benchmark."""
    num_frames: int | None = None
    """Evenly spaced frames per clip; None uses the model's number."""
    resize: Resize = "squash"
    """How frames are made square."""
    frame_rules: FrameRules = 2
    """Rules by which frames of videos decoded on the fly are found and cropped."""
    max_text_tokens: int | None = None
    """Maximum tokens per question; None uses the model's number."""
    resamples: int = 1000
    """Bootstrap resamples for 95% confidence intervals; 0 computes none."""
    num_workers: int | None = None
    """Workers on Ray; None uses two or, for a small model and few clips, no Ray at all."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    precision: Precision = "fp32"
    """Precision of matrix products."""
    batch_clips: int = 16
    """Clips that a worker encodes in one batch."""
    batch_pairs: int = 128
    """Questions that a worker answers in one batch."""
    num_pictures: int = 6
    """Questions shown in the report with frames."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow settings."""

    @property
    def label(self) -> str:
        """Name of the run in MLflow and in log lines."""
        return self.name or f"evaluate {self.benchmark}"

    @property
    def named(self) -> AnswerBenchmark | None:
        """The benchmark; None if it is `any`."""
        return ANSWER_BENCHMARKS.get(self.benchmark)
