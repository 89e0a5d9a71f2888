"""Sampling config and location of the quickstart's clip stores."""

from __future__ import annotations

from pipelines.common.config import fingerprint, to_dict
from pipelines.video.config import SamplingConfig


def tiny_sampling() -> SamplingConfig:
    """Return the sampling config: 12 frames of 64 pixels, twice as many as the tiny model uses."""
    return SamplingConfig(num_frames=12, size=64)


def quickstart_store(folder: str, split: str) -> str:
    """Return the location of a split's clip store in a quickstart folder."""
    return f"{folder}/clips/{split}/{fingerprint(to_dict(tiny_sampling()))}"
