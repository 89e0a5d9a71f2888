"""Settings of the captioning stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg

from pipelines.common.config import require
from pipelines.feed.config import Resize
from stgt.config import Precision
from stgt.field_marks import Common, FieldMark

DEFAULT_WORKERS = 2
"""Number of workers on Ray."""


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """Captions that a model writes for the clips of a manifest."""

    manifest: Annotated[str, Common("data"), FieldMark.LOCATION]
    """Manifest (.parquet) with the clips. Local or s3://. It stays as it is."""
    store: Annotated[str | None, arg(aliases=("--data",)), Common("data"), FieldMark.LOCATION] = (
        None
    )
    """Clip store with the frames of these clips, or the folder above it. None decodes the videos
    of the manifest, which takes longer."""
    checkpoint: Annotated[str, Common("data"), FieldMark.LOCATION_OR_NAME]
    """Checkpoint or model folder of STGT, which writes captions, or the folder of its training,
    which stands for its best checkpoint."""
    output: Annotated[str, Common("data"), FieldMark.LOCATION]
    """The new manifest (.parquet): the rows of the manifest, with the captions in
    extras.generated. Local or s3://. Running the same command again continues an interrupted
    run."""
    method: Annotated[Literal["beam", "nucleus"], Common("captions")] = "beam"
    """How words are chosen: beam searches for the most probable caption; nucleus draws each word
    from the most probable ones, which gives more varied captions."""
    num_beams: Annotated[int, Common("captions")] = 3
    """Width of the beam search. 1 takes the most probable word each time."""
    top_p: Annotated[float, Common("captions")] = 0.9
    """For nucleus: words are drawn from the smallest set whose total probability reaches this
    value."""
    temperature: Annotated[float, Common("captions")] = 1.0
    """For nucleus: values below 1 make probable words more probable."""
    captions_per_clip: Annotated[int, Common("captions")] = 1
    """Captions to write for each clip: the best ones of the beam search, at most num_beams, or
    independent samples. Repeated captions are dropped, so a clip may get fewer."""
    min_tokens: Annotated[int, Common("captions")] = 1
    """Minimum length of a caption, in tokens."""
    max_tokens: Annotated[int | None, Common("captions")] = None
    """Maximum length of a caption, in tokens. None uses the model's length of texts."""
    seed: Annotated[int, Common("captions")] = 0
    """Seed for nucleus sampling. Each clip's captions depend only on this seed and the clip's
    id."""
    num_frames: int | None = None
    """Evenly spaced frames per clip. None uses the model's number."""
    resize: Resize = "squash"
    """How frames are made square: squash ignores the aspect ratio, crop cuts off the longer side.
    A clip store must have been ingested with the same setting."""
    num_workers: Annotated[int | None, Common("workers"), FieldMark.OPERATIONAL] = None
    """Number of workers on Ray. None uses two or, for a small model and few clips, no Ray at all,
    since starting workers would take longer than the work."""
    use_gpu: Annotated[bool, Common("workers"), FieldMark.OPERATIONAL] = False
    """Give each worker one GPU."""
    precision: Annotated[Precision, Common("workers")] = "fp32"
    """Precision of matrix products."""
    batch_clips: Annotated[int, Common("workers"), FieldMark.OPERATIONAL] = 16
    """Clips that a worker captions in one batch."""
    max_bad_fraction: Annotated[float, Common("workers"), FieldMark.OPERATIONAL] = 0.1
    """Fail if more than this fraction of the clips cannot be decoded."""

    def __post_init__(self) -> None:
        require(
            self.output.endswith(".parquet"),
            "output",
            self.output,
            "must be the name of a manifest, which ends in .parquet",
        )
        for name in ("num_beams", "captions_per_clip", "min_tokens", "batch_clips"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "must be at least 1")
        for name in ("max_tokens", "num_frames", "num_workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "must be at least 1")
        require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"must not exceed max_tokens ({self.max_tokens})",
        )
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        require(
            self.method == "nucleus" or self.captions_per_clip <= self.num_beams,
            "captions_per_clip",
            self.captions_per_clip,
            f"must not exceed num_beams ({self.num_beams}) with method = beam",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            "max_bad_fraction",
            self.max_bad_fraction,
            "must lie in [0, 1]",
        )

    def settings(self, num_frames: int, max_tokens: int) -> dict[str, Any]:
        """Return what captions depend on besides the model and the frames, for `extras.generated`.

        Args:
            num_frames: Frames per clip.
            max_tokens: Maximum length of a caption.
        """
        sampled = {"top_p": self.top_p, "temperature": self.temperature, "seed": self.seed}
        return {
            "method": self.method,
            **({"num_beams": self.num_beams} if self.method == "beam" else sampled),
            "captions_per_clip": self.captions_per_clip,
            "min_tokens": self.min_tokens,
            "max_tokens": max_tokens,
            "num_frames": num_frames,
            "resize": self.resize,
            "precision": self.precision,
        }
