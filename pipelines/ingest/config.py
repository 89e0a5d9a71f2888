"""Settings of the ingest stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.common.config import TrackingConfig, require, to_dict
from pipelines.video.config import ClipRequirements, DecodeLimits, DecodeReason, SamplingConfig


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Clips that are left out on purpose, each under a reason of its own; by default none."""

    min_short_side: int | None = None
    """Least pixels of the shorter side of a video's frames (too_small)."""
    min_duration_s: float | None = None
    """Least seconds of a clip (too_short)."""
    max_duration_s: float | None = None
    """Most seconds of a clip (too_long)."""
    min_caption_words: int | None = None
    """Least words of a caption; a clip with none that is left goes (caption_too_short)."""
    max_caption_words: int | None = None
    """Most words of a caption; a clip with none that is left goes (caption_too_long)."""
    unique_captions: bool = False
    """Of clips whose captions are equal once cleaned, keep one (duplicate_caption)."""
    unique_videos: bool = False
    """Of clips of the same bytes and span, keep one (duplicate_video)."""

    def __post_init__(self) -> None:
        for name, value in to_dict(self).items():
            if value is not None:
                require(value >= 0, f"filters.{name}", value, "must not be negative")
        for low, high in (
            ("min_duration_s", "max_duration_s"),
            ("min_caption_words", "max_caption_words"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None:
                require(least <= most, f"filters.{low}", least, f"must not exceed {high}, {most}")

    @property
    def requirements(self) -> ClipRequirements:
        """The filters that the decoder applies."""
        return ClipRequirements(
            min_short_side=self.min_short_side,
            min_duration_s=self.min_duration_s,
            max_duration_s=self.max_duration_s,
        )


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """A manifest -> a verified clip store, with a quarantine for clips that cannot be used."""

    manifest: str
    """The clip manifest (Parquet) from jobs.manifest; local or s3://."""
    output: str
    """Folder of clip stores, local or s3://; a store gets a folder named by its settings in it."""
    name: str = "ingest"
    """Name of the run in MLflow."""
    quarantine: str | None = None
    """Another folder or s3:// prefix for the quarantine; None keeps it in the store's folder."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How frames are chosen and stored."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which clips are left out on purpose."""
    limit: int | None = None
    """Take only so many clips, a random sample, to see what the whole would take."""
    verify: bool = False
    """Only check a finished store: that nothing is missing, changed or there twice."""
    retry_quarantined: tuple[DecodeReason, ...] | None = None
    """Only try clips in quarantine again: those with the reasons that follow, or with any."""
    clips_per_shard: int = 1024
    """Clips per shard, about; small manifests get smaller shards."""
    num_workers: int | None = None
    """Decoding workers, one CPU each; None takes one per CPU of the cluster."""
    deadline_s: float = DecodeLimits.deadline_s
    """A clip that takes longer to decode is given up and its decoder killed."""
    max_pixels: int = DecodeLimits.max_pixels
    """A video with larger frames is not decoded."""
    max_bytes: int = DecodeLimits.max_bytes
    """Nor a larger file."""
    memory_limit_bytes: int = DecodeLimits.memory_limit_bytes
    """Address space a decoder may use beyond what it starts with."""
    max_bad_fraction: float = 0.1
    """The run fails when a larger share of the clips cannot be used; filters do not count."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the report is recorded."""

    def __post_init__(self) -> None:
        require(self.clips_per_shard >= 1, "clips_per_shard", self.clips_per_shard, "must be >= 1")
        require(self.deadline_s > 0, "deadline_s", self.deadline_s, "must be positive")
        require(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction",
            self.max_bad_fraction,
            "must lie in [0, 1]",
        )
        for name in ("max_pixels", "max_bytes", "memory_limit_bytes"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        if self.limit is not None:
            require(self.limit >= 1, "limit", self.limit, "must be at least 1")
        if self.num_workers is not None:
            require(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1")
        require(
            not (self.verify and self.retry_quarantined is not None),
            "verify",
            self.verify,
            "cannot be asked for together with retry_quarantined",
        )

    @property
    def limits(self) -> DecodeLimits:
        """What decoding one clip may cost."""
        return DecodeLimits(
            deadline_s=self.deadline_s,
            max_pixels=self.max_pixels,
            max_bytes=self.max_bytes,
            memory_limit_bytes=self.memory_limit_bytes,
        )
