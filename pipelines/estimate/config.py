"""Settings for estimating an ingest and a training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from tyro.conf import arg

from pipelines.common.config import require
from pipelines.train.config import TrainConfig
from pipelines.train.peak_rates import GpuType
from stgt.field_marks import Common, FieldMark

STORED_FRAMES = 16

PLACEHOLDER = "s3://not-read"
"""Location of data, output and initial weights, none of which an estimate reads."""


@dataclass(frozen=True, kw_only=True)
class EstimateConfig:
    """Estimate hours, storage and cost of an ingest and a training."""

    train: Annotated[
        TrainConfig,
        arg(name=""),  # so that flags have the names that they have in jobs.train
        Common("training", only=("epochs", "steps", "global_batch", "num_loaders")),
    ]
    """The training. Neither its data nor its output is read, and of its initial weights only the
    sizes of a dual encoder."""
    clips: Annotated[int, Common("data")]
    """Number of clips to ingest and to train on."""
    captions_per_clip: Annotated[float, Common("data")] = 1.0
    """Mean number of captions per clip. An epoch uses each caption once."""
    clip_s: Annotated[float, Common("data")] = 18.0
    """Duration of a generated clip, in seconds. Clips of WebVid last 18 s on average."""
    source_width: int = 596
    """Width of a generated clip, in pixels; even. WebVid's videos have 596."""
    source_height: int = 336
    """Height of a generated clip, in pixels; even."""
    source_fps: float = 25.0
    """Frames per second of a generated clip."""
    videos: Annotated[tuple[str, ...], Common("data"), FieldMark.LOCATION] = ()
    """Videos to measure instead of a generated clip, local or s3://. They should be typical of the
    data set; each counts as one clip."""
    stored_frames: int = STORED_FRAMES
    """Frames that the ingest stores per clip, as sampling.num_frames of jobs.ingest."""
    jpeg_quality: int = 95
    """Quality of stored frames, as sampling.jpeg_quality of jobs.ingest."""
    cpus: Annotated[int | None, Common("cluster")] = None
    """CPUs that ingest. None takes those of this machine."""
    gpus: Annotated[int | None, Common("cluster")] = None
    """GPUs that train, one per training worker. None takes the recipe's number."""
    gpu_type: Annotated[GpuType, Common("cluster")] = "H100"
    """Type of the GPUs, which decides the arithmetic that they do per second."""
    price_gpu_hour: Annotated[float | None, Common("cluster")] = None
    """Price of one GPU for one hour, in any currency. None estimates hours only."""
    price_cpu_hour: Annotated[float | None, Common("cluster")] = None
    """Price of one CPU for one hour, in the same currency. None estimates hours only."""
    ingest_clips_per_cpu_s: Annotated[float | None, Common("rates")] = None
    """Clips that one CPU ingests per second. None measures it on this machine."""
    feed_clips_per_cpu_s: Annotated[float | None, Common("rates")] = None
    """Clips that one data worker reads and augments per second. None measures it."""
    train_clips_per_gpu_s: Annotated[float | None, Common("rates")] = None
    """Clips that one GPU (or CPU worker) trains on per second. None computes it."""
    bytes_per_clip: Annotated[float | None, Common("rates")] = None
    """Bytes of the clip store per clip. None measures it."""

    def __post_init__(self) -> None:
        for name in ("clips", "stored_frames"):
            value = getattr(self, name)
            # The mark of a setting that is not given yet is no number.
            require(not isinstance(value, int) or value >= 1, name, value, "must be at least 1")
        for name in ("source_width", "source_height"):
            value = getattr(self, name)
            require(value >= 16 and value % 2 == 0, name, value, "must be even and at least 16")
        require(
            self.captions_per_clip >= 1,
            "captions_per_clip",
            self.captions_per_clip,
            "must be at least 1",
        )
        require(
            1 <= self.jpeg_quality <= 100,
            "jpeg_quality",
            self.jpeg_quality,
            "must be between 1 and 100",
        )
        require(0 < self.clip_s <= 600, "clip_s", self.clip_s, "must be positive and at most 600 s")
        require(1 <= self.source_fps <= 240, "source_fps", self.source_fps, "must be from 1 to 240")
        for name in (
            "ingest_clips_per_cpu_s",
            "feed_clips_per_cpu_s",
            "train_clips_per_gpu_s",
            "bytes_per_clip",
        ):
            value = getattr(self, name)
            require(value is None or 0 < value < float("inf"), name, value, "must be positive")
        for name in ("price_gpu_hour", "price_cpu_hour"):
            value = getattr(self, name)
            require(value is None or 0 <= value < float("inf"), name, value, "must be at least 0")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(
            self.gpus is None or self.train.use_gpu,
            "gpus",
            self.gpus,
            "this recipe trains on CPUs; leave --gpus out, or add --use-gpu",
        )
        require(
            self.gpus is None or self.train.global_batch % self.gpus == 0,
            "gpus",
            self.gpus,
            f"must divide the global batch of {self.train.global_batch} clips; choose another "
            f"number, or set --global-batch to a multiple such as "
            f"{-(-self.train.global_batch // (self.gpus or 1)) * (self.gpus or 1)}",
        )
        require(
            self.train.num_frames <= self.stored_frames,
            "stored_frames",
            self.stored_frames,
            f"must be at least the number of frames that the training takes, "
            f"{self.train.num_frames}",
        )

    @property
    def training(self) -> TrainConfig:
        """The training on the GPUs that were asked for."""
        if self.gpus is None:
            return self.train
        return replace(self.train, num_workers=self.gpus, min_workers=None)
