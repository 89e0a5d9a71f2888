"""How the quickstart samples clips, and where it keeps them."""

from __future__ import annotations

from pipelines.common.config import fingerprint, to_dict
from pipelines.video.config import SamplingConfig


def tiny_sampling() -> SamplingConfig:
    """Twelve frames of 64 pixels a clip: twice what the tiny model takes."""
    return SamplingConfig(num_frames=12, size=64)


def quickstart_store(folder: str, split: str) -> str:
    """Where the quickstart in a folder keeps the clip store of a split."""
    return f"{folder}/clips/{split}/{fingerprint(to_dict(tiny_sampling()))}"
