"""Settings for frame sampling, limits on decoding, and requirements that clips must meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Fixed, arg

from pipelines.common.config import require
from stgt.field_marks import Common, Earlier
from stgt.inputs.frame_choice import FrameChoice

DecodeReason = Literal[
    "missing",
    "forbidden",
    "unreachable",
    "empty",
    "not_a_video",
    "encrypted",
    "no_video_stream",
    "undecodable",
    "empty_span",
    "too_large",
    "out_of_memory",
    "timeout",
    "crashed",
]
"""Why a clip could not be decoded; `pipelines.video.decoder.REASONS` explains each code."""
FrameRules = Literal[1, 2]
"""Rules by which frames of a clip are found and cropped; see `SamplingConfig.frame_rules`."""
DEFAULT_VIDEO_CACHE_BYTES = 16 * 1024**3
"""Enough for a few films, or for thousands of short videos."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the frames of a clip are chosen and stored. Its hash determines the clip store's name."""

    num_frames: Annotated[int, Common("frames")] = 16
    """Frames to store per clip. Storing more than the model takes lets training sample frames at
    random."""
    frame_choice: FrameChoice = "uniform"
    """How the stored frames are chosen: uniform takes equal steps, middle and random take one frame
    of each equal segment, head_tail draws half of the frames from each half of the clip, and
    random_sorted draws all of them from the whole clip."""
    size: Annotated[int, Common("frames")] = 224
    """Edge length of a stored frame, in pixels."""
    resize: Annotated[Literal["squash", "crop"], Common("frames")] = "squash"
    """How frames are made square: squash ignores the aspect ratio, as the published evaluation
    does; crop takes the center."""
    seed: int = 0
    """Seed for random frame choice, which depends only on this seed and the clip's id."""
    codec: Literal["jpeg", "raw"] = "jpeg"
    """Encoding of stored frames."""
    jpeg_quality: int = 95
    """JPEG quality, 1 to 100."""
    decoder: Annotated[
        Literal["auto", "decord", "pyav"], arg(aliases=("--decoder",)), Common("frames")
    ] = "pyav"
    """Video decoder: pyav is exact for every container and the fastest; auto uses decord, which
    produced the published results, where it shows the frames that PyAV shows, and PyAV elsewhere;
    decord uses only decord."""
    frame_rules: Annotated[FrameRules, Fixed, Earlier(1)] = 2
    """Rules by which frames are found and cropped. With 2, times count from the start of the file,
    a span includes the frame on display at its start, and the pixel aspect ratio is applied before
    cropping. Stores of earlier versions continue with 1."""

    def __post_init__(self) -> None:
        require(self.num_frames >= 1, "sampling.num_frames", self.num_frames, "must be >= 1")
        require(self.size >= 1, "sampling.size", self.size, "must be >= 1")
        require(
            1 <= self.jpeg_quality <= 100,
            "sampling.jpeg_quality",
            self.jpeg_quality,
            "must be between 1 and 100",
        )


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """Limits on decoding one clip; a clip that exceeds one of them is rejected."""

    deadline_s: float = 60.0
    """Time limit for decoding one clip, in seconds. The decoder process is killed after it."""
    max_pixels: int = 8192 * 4320
    """Largest frame to decode, in pixels (width times height)."""
    max_bytes: int = 8 * 1024**3
    """Largest file to decode, in bytes."""
    memory_limit_bytes: int = 4 * 1024**3
    """Memory that the decoder process may allocate after it has started, in bytes of address
    space."""


@dataclass(frozen=True, kw_only=True)
class ClipRequirements:
    """Requirements that a clip must meet to be decoded; None turns a requirement off."""

    min_short_side: int | None = None
    """Minimum length of the shorter side of the video's frames, in pixels."""
    min_duration_s: float | None = None
    """Minimum duration of a clip, in seconds."""
    max_duration_s: float | None = None
    """Maximum duration of a clip, in seconds."""
