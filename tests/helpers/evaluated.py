"""A checkpoint with its evaluation, as tests of the registry need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.common.config import TrackingConfig
from pipelines.registry.config import RegisterConfig


@dataclass(frozen=True)
class Evaluated:
    """A checkpoint of an untrained model, with its evaluation, in a folder of its own."""

    checkpoint: str
    manifest: str
    evaluation: str
    videos: tuple[str, ...]
    captions: tuple[str, ...]
    tracking: TrackingConfig

    def config(self, **changes: Any) -> RegisterConfig:
        values = {"checkpoint": self.checkpoint, "name": "retrieval", "tracking": self.tracking}
        return RegisterConfig(**{**values, **changes})
