"""Settings of the evaluation stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from pipelines.artifacts.benchmark_names import BenchmarkName
from pipelines.common.config import TrackingConfig, require
from stgt.config import Precision


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Text-video retrieval by the protocol of a benchmark."""

    benchmark: Annotated[BenchmarkName, Positional] = "any"
    """Which protocol: sizes of the split are checked, and what is scored is said. `any` takes any
    manifest as it is."""
    data: Annotated[str, arg(aliases=("--store",))]
    """Frames of the gallery: a clip store (a folder that holds catalogue.json), or a manifest
    (.parquet), whose videos are decoded on the fly; local or s3://."""
    checkpoint: str
    """Checkpoint folder of the model, pre-trained (zero-shot) or fine-tuned."""
    output: str
    """Folder for embeddings, metrics and the report; local or s3://."""
    manifest: str | None = None
    """Manifest with the split's clips and captions, where a store holds more clips, or has some in
    quarantine; None: what data holds."""
    embeddings: str | None = None
    """Folder of embeddings; None: in output. Those of another evaluation are used when they are of
    the same checkpoint, clips and settings."""
    name: str | None = None
    """Name of the run in MLflow; None names it by the benchmark."""
    k_rerank: int = 128
    """Candidates per caption (and per video) that are scored again by the matching head; 0 leaves
    reranking out. 128 is BLIP-2's, from whose code the published evaluation comes."""
    num_frames: int | None = None
    """Frames per clip, evenly spread; None takes the model's."""
    resize: Literal["squash", "crop"] = "squash"
    """How frames are fitted into the square: squash as published, or crop the longer side. A clip
    store must have been ingested so."""
    max_text_tokens: int | None = None
    """Tokens of a caption, the rest is cut; None takes the benchmark's, or the model's."""
    allow_missing: bool = False
    """Score only the videos that are there: every figure is then named `partial/...`. Otherwise a
    missing video counts as a miss."""
    dual_softmax: bool = False
    """Also give metrics with dual softmax, `dsl/...`: transductive, since it uses all queries at
    once."""
    resamples: int = 1000
    """Resamples of the bootstrap for 95 % intervals; 0 leaves them out."""
    against: Literal["published"] | None = None
    """published: check first what it takes to reproduce the authors' evaluation, and stop when
    something is missing."""
    num_workers: int = 2
    """Evaluation workers."""
    use_gpu: bool = False
    """Give each evaluation worker one GPU."""
    precision: Precision = "fp32"
    """What matrix products compute in."""
    batch_clips: int = 16
    """Clips encoded at a time by a worker."""
    batch_pairs: int = 128
    """Pairs matched at a time by a worker."""
    num_pictures: int = 6
    """Captions shown with the frames of their best videos."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is recorded."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "batch_clips", "batch_pairs", "num_pictures"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("k_rerank", "resamples"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")
        frames, tokens = self.num_frames, self.max_text_tokens
        require(frames is None or frames >= 1, "num_frames", frames, "must be at least 1")
        # The first and the last token frame the text.
        require(tokens is None or tokens >= 3, "max_text_tokens", tokens, "must be at least 3")
        require(
            self.embeddings is None or self.embeddings.rstrip("/") != self.output.rstrip("/"),
            "embeddings",
            self.embeddings,
            "is a folder of its own, such as OTHER_OUTPUT/embeddings",
        )

    @property
    def label(self) -> str:
        """Name of the run."""
        return self.name or f"evaluate {self.benchmark}"
