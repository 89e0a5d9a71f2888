"""Settings for cutting videos into clips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.common.config import require
from stgt.field_marks import FieldMark

SHORTEST_WINDOW_S = 0.1
"""Shortest window, and shortest time between the beginnings of two windows, in seconds."""
ROUNDING_S = 1e-6
"""The difference of two settings may be smaller by this, since they are binary fractions."""
COMMON = ("cut", "window_s", "overlap_s", "min_shot_s", "max_shot_s", "subtitles")
"""Names of the fields that most people set."""


@dataclass(frozen=True, kw_only=True)
class CuttingConfig:
    """How the videos of a manifest are cut into clips, and whether subtitles are their captions."""

    cut: Literal["windows", "shots"] | None = None
    """Cut every clip into windows of one length, or where another shot begins. None cuts
    nothing."""
    window_s: float = 10.0
    """Length of a window, in seconds. The last window of a clip is kept if it is at least half as
    long, and is otherwise joined to the one before."""
    overlap_s: float = 0.0
    """Overlap of two windows in a row, in seconds."""
    shot_detector: Literal["adaptive", "content", "hash", "histogram", "threshold"] = "adaptive"
    """PySceneDetect's detector of shots."""
    shot_threshold: float | None = None
    """Threshold of the detector. None takes PySceneDetect's default."""
    min_shot_s: float = 0.6
    """Shortest shot, in seconds. A shorter one is joined to the next one, and the last to the one
    before."""
    max_shot_s: float | None = None
    """Longest shot, in seconds. A longer one is divided into equal parts. None divides none."""
    subtitles: bool = False
    """Take captions from the subtitles (.srt, .vtt) beside each video. Without cutting, each
    subtitle becomes a clip."""
    subtitle_language: str | None = None
    """Language of the subtitles, such as en for NAME.en.srt. None takes NAME.srt or the only
    language."""
    subtitle_encoding: str | None = None
    """Encoding of subtitles that are not UTF-8, such as cp1252. None rejects their videos."""
    num_workers: int | None = None
    """Number of workers that examine videos to cut, one CPU each. None uses one per CPU of the
    cluster."""
    deadline_s: float = 60.0
    """Time limit for examining a video to cut, in seconds per minute of video, and at least for
    one minute. When it is exceeded, the video's clips are rejected."""
    cache_dir: Annotated[str | None, FieldMark.LOCATION] = None
    """Folder on each node for remote videos that are cut, as for jobs.ingest. None uses a folder
    below the temporary folder."""
    cache_gb: float = 16.0
    """Size limit of that folder, in GB. It also takes no more than half of the free disk space."""

    def __post_init__(self) -> None:
        for name in FINITE:
            value = getattr(self, name)
            require(value is None or math.isfinite(value), name, value, "must be finite")
        require(
            self.window_s >= SHORTEST_WINDOW_S,
            "window_s",
            self.window_s,
            f"must be at least {SHORTEST_WINDOW_S}",
        )
        require(
            self.overlap_s >= 0
            and self.window_s - self.overlap_s >= SHORTEST_WINDOW_S - ROUNDING_S,
            "overlap_s",
            self.overlap_s,
            f"must not be negative and must be less than window_s = {self.window_s:g} by at least "
            f"{SHORTEST_WINDOW_S}",
        )
        require(self.min_shot_s >= 0, "min_shot_s", self.min_shot_s, "must not be negative")
        if self.max_shot_s is not None:
            require(
                self.max_shot_s >= max(2 * self.min_shot_s, SHORTEST_WINDOW_S),
                "max_shot_s",
                self.max_shot_s,
                f"must be at least {SHORTEST_WINDOW_S} and twice min_shot_s = {self.min_shot_s:g}, "
                "since parts may be half as long",
            )
        for cut, names in NEEDED_FOR.items():
            for name in names:
                value = getattr(self, name)
                unset = value == CuttingConfig.__dataclass_fields__[name].default
                rule = f"has an effect only with --cut {cut}"
                require(unset or self.cut == cut, name, value, rule)
        for name in ("subtitle_language", "subtitle_encoding"):
            value = getattr(self, name)
            rule = "has an effect only with --subtitles"
            require(value is None or self.subtitles, name, value, rule)
        if self.subtitle_encoding is not None:
            require(
                _is_encoding(self.subtitle_encoding),
                "subtitle_encoding",
                self.subtitle_encoding,
                "is not the name of an encoding of text, such as cp1252 or shift_jis",
            )
        if self.num_workers is not None:
            require(self.num_workers >= 1, "num_workers", self.num_workers, "must be at least 1")
        require(self.deadline_s > 0, "deadline_s", self.deadline_s, "must be positive")
        require(self.cache_gb > 0, "cache_gb", self.cache_gb, "must be positive")

    @property
    def changes_clips(self) -> bool:
        """Whether clips are cut, or get captions or spans from subtitles."""
        return self.cut is not None or self.subtitles


FINITE = (
    "window_s",
    "overlap_s",
    "shot_threshold",
    "min_shot_s",
    "max_shot_s",
    "deadline_s",
    "cache_gb",
)
"""Settings that are numbers, of which neither infinity nor NaN has a meaning."""
NEEDED_FOR = {
    "windows": ("window_s", "overlap_s"),
    "shots": ("shot_detector", "shot_threshold", "min_shot_s", "max_shot_s"),
}
"""Settings that have an effect for one kind of cutting alone."""


def _is_encoding(name: str) -> bool:
    """Return whether text can have an encoding; Python also has encodings of other things."""
    try:
        "a".encode(name)  # unlike this, decoding no bytes works with any name
    except (LookupError, ValueError):
        return False
    return True
