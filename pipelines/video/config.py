"""How frames are sampled from a clip, and what decoding a clip may cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from pipelines.common.config import require
from stgt.inputs.frame_choice import FrameChoice

DecodeReason = Literal[
    "missing",
    "forbidden",
    "unreachable",
    "empty",
    "not_a_video",
    "no_video_stream",
    "undecodable",
    "empty_span",
    "too_large",
    "out_of_memory",
    "timeout",
    "crashed",
]
"""Why a clip gives no frames; `pipelines.decode.REASONS` says what each means."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How frames of a clip are chosen and stored; its hash names the clip store."""

    num_frames: int = 16
    """Frames stored per clip: more than a sample takes, so that temporal sampling stays random."""
    frame_choice: FrameChoice = "uniform"
    """Which frames of the video are stored."""
    size: int = 224
    """Edge of a stored frame in pixels."""
    resize: Literal["squash", "crop"] = "squash"
    """squash ignores the aspect ratio, as the published evaluation does; crop keeps the centre."""
    seed: int = 0
    """Of a random choice of frames, which depends on this and the clip's id alone."""
    codec: Literal["jpeg", "raw"] = "jpeg"
    """How a stored frame is coded."""
    jpeg_quality: int = 95
    """JPEG quality, 1 to 100."""
    decoder: Annotated[Literal["auto", "decord", "pyav"], arg(aliases=("--decoder",))] = "pyav"
    """pyav is exact on every container and fastest; auto takes decord, with whose frames published
    numbers were computed, where it is exact, and PyAV elsewhere; decord never anything else."""

    def __post_init__(self) -> None:
        require(self.num_frames >= 1, "sampling.num_frames", self.num_frames, "must be >= 1")
        require(self.size >= 1, "sampling.size", self.size, "must be >= 1")
        require(
            1 <= self.jpeg_quality <= 100,
            "sampling.jpeg_quality",
            self.jpeg_quality,
            "must lie between 1 and 100",
        )


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """What decoding one clip may cost before the clip is given up."""

    deadline_s: float = 60.0
    """Seconds; the decoder process is killed when they have passed."""
    max_pixels: int = 8192 * 4320
    """Largest frame of a video, in pixels."""
    max_bytes: int = 8 * 1024**3
    """Largest file, in bytes."""
    memory_limit_bytes: int = 4 * 1024**3
    """Address space of the decoder process beyond what it starts with, in bytes."""


@dataclass(frozen=True, kw_only=True)
class ClipRequirements:
    """What a clip must meet to be decoded; None leaves a requirement out."""

    min_short_side: int | None = None
    """Smallest short side of the video's frames, in pixels."""
    min_duration_s: float | None = None
    """Shortest clip, in seconds."""
    max_duration_s: float | None = None
    """Longest clip, in seconds."""
