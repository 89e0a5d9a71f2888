"""Settings of the data workers that load training clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.video.config import FrameRules
from stgt.config import AugmentConfig
from stgt.inputs.frame_choice import FrameChoice

Resize = Literal["squash", "crop"]
"""How a frame is made square: squash ignores the aspect ratio; crop takes the center."""
DEFAULT_CACHE_BYTES = 2 * 1024**3
"""Enough for about a dozen shards of the usual size; only a few are in use at a time."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """How a data worker loads, samples and augments clips."""

    data: tuple[str, ...]
    vocab: str
    max_text_tokens: int
    num_frames: int
    size: int
    resize: Resize
    frame_choice: FrameChoice
    augment: AugmentConfig
    seed: int
    mix: tuple[int, ...] = ()
    frame_rules: FrameRules = 2
    hold_out: int = 0
    cache_dir: str | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
