"""Settings for the evaluation stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Fixed, Positional, arg

from pipelines.artifacts.benchmark_names import PUBLISHED_CANDIDATES, BenchmarkName
from pipelines.common.config import TrackingConfig, require
from pipelines.feed.config import FrameRules
from stgt.config import Precision
from stgt.field_marks import Common, Earlier, FieldMark


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Evaluation of text-video retrieval under a benchmark's protocol."""

    benchmark: Annotated[BenchmarkName, Positional, Common("data")] = "any"
    """Benchmark protocol. The size of the split is checked. `any` accepts every manifest without
    checks."""
    data: Annotated[str, arg(aliases=("--store",)), Common("data"), FieldMark.LOCATION]
    """Videos of the gallery: a clip store or the folder above it, or a manifest (.parquet) whose
    videos are decoded on the fly. Local or s3://."""
    checkpoint: Annotated[str, Common("data"), FieldMark.LOCATION]
    """Checkpoint of the model, either pre-trained (zero-shot) or fine-tuned, or the folder of a
    training run, which stands for its best checkpoint."""
    output: Annotated[str, Common("data"), FieldMark.LOCATION]
    """Folder for embeddings, metrics and the report. Local or s3://."""
    manifest: Annotated[str | None, Common("data"), FieldMark.LOCATION] = None
    """Manifest with the clips and captions of the split. Needed if the store holds other clips as
    well or has clips in quarantine. None evaluates all clips in data."""
    embeddings: Annotated[str | None, FieldMark.LOCATION] = None
    """Folder for embeddings. Embeddings of another evaluation are reused if they were computed with
    the same checkpoint, clips and settings. None uses a subfolder of output."""
    name: Annotated[str | None, Common("run")] = None
    """Name of the MLflow run. None uses the name of the benchmark."""
    k_rerank: Annotated[int, Common("scoring")] = PUBLISHED_CANDIDATES
    """Number of candidates per caption (and per video) to rerank with the matching head. 0 disables
    reranking. The default is the published setting, except that an output folder whose evaluation
    began with another number continues with that number."""
    num_frames: Annotated[int | None, Common("scoring")] = None
    """Number of evenly spaced frames per clip. None uses the model's value."""
    resize: Literal["squash", "crop"] = "squash"
    """How frames are made square: `squash` ignores the aspect ratio, as published; `crop` cuts off
    the longer side. A clip store must have been ingested with the same setting."""
    frame_rules: Annotated[FrameRules, Fixed, Earlier(1)] = 2
    """Rules by which frames of videos decoded on the fly are found and cropped; see
    sampling.frame_rules of jobs.ingest. Evaluations of earlier versions continue with 1."""
    max_text_tokens: int | None = None
    """Maximum number of tokens per caption; longer captions are truncated. None uses the value of
    the benchmark, or of the model if the benchmark has none."""
    allow_missing: Annotated[bool, Common("data")] = False
    """Leave missing videos out of the evaluation; all metrics are then named `partial/...`. By
    default a missing video counts as a miss."""
    dual_softmax: Annotated[bool, Common("scoring")] = False
    """Also compute metrics with dual softmax, named `dsl/...`. They are transductive: scores depend
    on all queries of the test set."""
    resamples: Annotated[int, Common("scoring")] = 1000
    """Number of bootstrap resamples for 95% confidence intervals. 0 disables the intervals."""
    against: Annotated[Literal["published"] | None, Common("scoring")] = None
    """With `published`, first check all requirements for reproducing the authors' evaluation, and
    stop if one is not met."""
    num_workers: Annotated[int | None, Common("workers")] = None
    """Number of evaluation workers. None uses two or, for a small model and gallery, no Ray at all,
    since starting workers would take longer than the evaluation."""
    use_gpu: Annotated[bool, Common("workers")] = False
    """Give each evaluation worker one GPU."""
    precision: Annotated[Precision, Common("workers")] = "fp32"
    """Floating-point precision of matrix products."""
    batch_clips: Annotated[int, Common("workers")] = 16
    """Number of clips that a worker encodes in one batch."""
    batch_pairs: int = 128
    """Number of text-video pairs that a worker matches in one batch."""
    num_pictures: int = 6
    """Number of captions shown in the report with frames of their top-ranked videos."""
    tracking: Annotated[TrackingConfig, Common("run", only=("uri", "experiment"))] = field(
        default_factory=TrackingConfig
    )
    """MLflow settings for this run."""

    def __post_init__(self) -> None:
        for name in ("batch_clips", "batch_pairs", "num_pictures"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        workers = self.num_workers
        require(workers is None or workers >= 1, "num_workers", workers, "must be at least 1")
        for name in ("k_rerank", "resamples"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        frames, tokens = self.num_frames, self.max_text_tokens
        require(frames is None or frames >= 1, "num_frames", frames, "must be at least 1")
        # One token each marks the start and the end of the text.
        require(tokens is None or tokens >= 3, "max_text_tokens", tokens, "must be at least 3")
        require(
            self.embeddings is None or self.embeddings.rstrip("/") != self.output.rstrip("/"),
            "embeddings",
            self.embeddings,
            "must be a folder other than output, such as OTHER_OUTPUT/embeddings",
        )

    @property
    def label(self) -> str:
        """Name of the run in MLflow and in log lines."""
        return self.name or f"evaluate {self.benchmark}"
