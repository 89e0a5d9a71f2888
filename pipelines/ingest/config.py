"""Settings for the ingest stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from pipelines.common.config import TrackingConfig, require, to_dict
from pipelines.video.config import ClipRequirements, DecodeLimits, DecodeReason, SamplingConfig
from stgt.field_marks import Common, Earlier, FieldMark

MOST_BITS = 7
"""Largest number of differing bits up to which near duplicates are found."""


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Filters that exclude clips, each with its own reason code. All are off by default."""

    min_short_side: int | None = None
    """Minimum length of the shorter side of a video's frames, in pixels (too_small)."""
    min_duration_s: float | None = None
    """Minimum duration of a clip, in seconds (too_short)."""
    max_duration_s: float | None = None
    """Maximum duration of a clip, in seconds (too_long)."""
    min_caption_words: int | None = None
    """Minimum number of words per caption. Shorter captions are dropped, and a clip without
    remaining captions is excluded (caption_too_short)."""
    max_caption_words: int | None = None
    """Maximum number of words per caption. Longer captions are dropped, and a clip without
    remaining captions is excluded (caption_too_long)."""
    unique_captions: bool = False
    """Keep only one of the clips whose captions are identical after cleaning
    (duplicate_caption)."""
    unique_videos: bool = False
    """Keep only one of the clips with identical video files and time spans (duplicate_video)."""
    near_duplicates: Annotated[int | None, Earlier(None)] = None
    """Keep only one of the clips whose stored frames look alike (near_duplicate). At least three
    quarters of their frames must have perceptual hashes that differ in at most this many of 64
    bits."""
    min_similarity: Annotated[float | None, Earlier(None)] = None
    """Minimum cosine similarity of a clip and its best caption, computed by the model of
    filters.checkpoint (low_similarity)."""
    checkpoint: Annotated[str | None, Earlier(None), FieldMark.LOCATION_OR_NAME] = None
    """Checkpoint, run, model folder or hf:NAME of the model for filters.min_similarity."""

    def __post_init__(self) -> None:
        for name, value in to_dict(self).items():
            if value is not None and name not in ("min_similarity", "checkpoint"):
                require(value >= 0, f"filters.{name}", value, "must not be negative")
        bits, least = self.near_duplicates, self.min_similarity
        require(
            bits is None or bits <= MOST_BITS,
            "filters.near_duplicates",
            bits,
            f"must not exceed {MOST_BITS} bits",
        )
        require(
            least is None or -1 <= least <= 1,
            "filters.min_similarity",
            least,
            "must lie in [-1, 1], since it is a cosine",
        )
        require(
            least is None or self.checkpoint is not None,
            "filters.min_similarity",
            least,
            "needs a model; give its checkpoint with --filters.checkpoint",
        )
        require(
            self.checkpoint is None or least is not None,
            "filters.checkpoint",
            self.checkpoint,
            "is only used with filters.min_similarity; set that as well",
        )
        for low, high in (
            ("min_duration_s", "max_duration_s"),
            ("min_caption_words", "max_caption_words"),
        ):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None:
                require(least <= most, f"filters.{low}", least, f"must not exceed {high}, {most}")

    @property
    def requirements(self) -> ClipRequirements:
        """Filters that the decoder applies."""
        return ClipRequirements(
            min_short_side=self.min_short_side,
            min_duration_s=self.min_duration_s,
            max_duration_s=self.max_duration_s,
        )


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Ingest of a manifest into a clip store, with a quarantine for clips that cannot be used."""

    manifest: Annotated[str, Common("data"), FieldMark.LOCATION]
    """Clip manifest (Parquet) written by jobs.manifest. Local or s3://."""
    output: Annotated[str, Common("data"), FieldMark.LOCATION]
    """Folder for clip stores. The store is written to a subfolder whose name is a hash of its
    settings. Local or s3://."""
    name: Annotated[str, Common("run")] = "ingest"
    """Name of the MLflow run."""
    quarantine: Annotated[str | None, FieldMark.LOCATION] = None
    """Folder for the quarantine, local or s3://. None uses a subfolder of the store."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How frames are sampled and stored."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Filters that exclude clips."""
    limit: Annotated[int | None, Common("data")] = None
    """Ingest only a random sample of this many clips, and estimate the time and space that the
    whole manifest would need. None ingests all clips."""
    verify: Annotated[bool, Common("run")] = False
    """Only verify a finished store: check for missing, changed and duplicate clips."""
    retry_quarantined: Annotated[tuple[DecodeReason, ...] | None, Common("run")] = None
    """Only retry clips in quarantine: those with the given reasons or, if none are given, all that
    could not be decoded."""
    allow_removals: Annotated[bool, Common("run")] = False
    """Remove clips from an existing store even if more than 10 % of its clips are not in the
    manifest anymore."""
    clips_per_shard: int = 1024
    """Approximate number of clips per shard. Small manifests get smaller shards."""
    num_workers: Annotated[int | None, Common("run")] = None
    """Number of decoding workers, one CPU each. None uses one per CPU of the cluster."""
    use_gpu: bool = False
    """Give each worker that computes similarities for filters.min_similarity one GPU."""
    deadline_s: Annotated[float, Common("run")] = DecodeLimits.deadline_s
    """Time limit for decoding one clip, in seconds. When it is exceeded, the decoder is killed and
    the clip is quarantined."""
    cache_dir: Annotated[str | None, FieldMark.LOCATION] = None
    """Folder on each node in which its decoding workers share the videos that they fetch and the
    indexes of long videos. None uses a folder below the temporary folder."""
    cache_gb: float = 16.0
    """Size limit of that folder, in GB. It also takes no more than half of the free disk space."""
    max_pixels: int = DecodeLimits.max_pixels
    """Largest frame size to decode, in pixels (width times height)."""
    max_bytes: int = DecodeLimits.max_bytes
    """Largest file to decode, in bytes."""
    memory_limit_bytes: int = DecodeLimits.memory_limit_bytes
    """Address space that a decoder process may use beyond its initial size, in bytes."""
    max_bad_fraction: Annotated[float, Common("run")] = 0.1
    """Fail if more than this fraction of the clips is unusable. Clips removed by filters do not
    count."""
    tracking: Annotated[TrackingConfig, Common("run", only=("uri", "experiment"))] = field(
        default_factory=TrackingConfig
    )
    """MLflow settings for this run."""

    def __post_init__(self) -> None:
        require(self.clips_per_shard >= 1, "clips_per_shard", self.clips_per_shard, "must be >= 1")
        require(self.deadline_s > 0, "deadline_s", self.deadline_s, "must be positive")
        require(self.cache_gb > 0, "cache_gb", self.cache_gb, "must be positive")
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
            "cannot be combined with retry_quarantined",
        )

    @property
    def limits(self) -> DecodeLimits:
        """Limits for decoding one clip."""
        return DecodeLimits(
            deadline_s=self.deadline_s,
            max_pixels=self.max_pixels,
            max_bytes=self.max_bytes,
            memory_limit_bytes=self.memory_limit_bytes,
        )
