"""Settings of the stage that stores frame features."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tyro.conf import arg

from pipelines.artifacts.frame_features import FeatureFormat
from pipelines.common.config import require
from stgt.config import AugmentConfig, Precision
from stgt.field_marks import Common, FieldMark

DEFAULT_WORKERS = 2
"""Number of workers on Ray."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Tokens of a frozen frame encoder for every frame of a clip store."""

    store: Annotated[str, arg(aliases=("--data",)), Common("data"), FieldMark.LOCATION]
    """Clip store with the frames, or the folder above it. Local or s3://."""
    checkpoint: Annotated[str, Common("data"), FieldMark.LOCATION_OR_NAME]
    """Checkpoint, model folder or training run with the frame encoder: the init_from of the
    trainings, or any checkpoint that came out of them."""
    output: Annotated[str, Common("data"), FieldMark.LOCATION]
    """Folder for the features. Local or s3://. Running the same command again continues."""
    format: Annotated[FeatureFormat, Common("features")] = "fp16"
    """How numbers are stored. fp8 takes half the space of fp16 and changes tokens by up to 6 %;
    fp32 takes twice the space."""
    views: Annotated[int, Common("features")] = 0
    """Augmented views of each clip, for trainings with crops, flips or RandAugment. 0 stores frames
    as they are, for trainings without augmentation, validation and evaluation."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation of the views. It must be that of the trainings that use them."""
    seed: int = 0
    """Random seed of the views. A view depends on the seed, the clip and its number alone."""
    precision: Annotated[Precision, Common("features")] = "fp32"
    """Precision of matrix products. Use that of the training."""
    batch_frames: Annotated[int, FieldMark.OPERATIONAL] = 64
    """Frames that a worker encodes at a time."""
    num_workers: Annotated[int | None, Common("workers"), FieldMark.OPERATIONAL] = None
    """Number of workers, with one CPU each. None uses two or, for a small model and store, no Ray
    at all."""
    use_gpu: Annotated[bool, Common("workers"), FieldMark.OPERATIONAL] = False
    """One GPU per worker."""
    verify: Annotated[bool, Common("data"), FieldMark.OPERATIONAL] = False
    """Only check that all files of finished features are as they were written."""

    def __post_init__(self) -> None:
        require(self.views >= 0, "views", self.views, "must not be negative")
        require(self.batch_frames >= 1, "batch_frames", self.batch_frames, "must be at least 1")
        workers = self.num_workers
        require(workers is None or workers >= 1, "num_workers", workers, "must be at least 1")
        require(
            self.views == 0 or not self.augment.changes_nothing,
            "views",
            self.views,
            "augmentation is off, so all views would be equal; use 0",
        )
