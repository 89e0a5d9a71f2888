"""Settings of the data workers that load training clips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pipelines.artifacts.generated_captions import CaptionChoice
from pipelines.feed.similar_captions import WINDOW
from pipelines.video.config import FrameRules
from stgt.config import AugmentConfig
from stgt.field_marks import FieldMark
from stgt.inputs.frame_choice import FrameChoice

Resize = Literal["squash", "crop"]
"""How a frame is made square: squash ignores the aspect ratio; crop takes the center."""
EpochUnit = Literal["captions", "clips"]
"""What an epoch uses once: every caption, or every clip with a caption drawn at random."""
HoldOutBy = Literal["video", "clip"]
"""What is held out: whole videos, or the last clips as in runs of earlier versions."""
DEFAULT_CACHE_BYTES = 2 * 1024**3
"""Enough for about a dozen shards of the usual size; only a few are in use at a time."""


@dataclass(frozen=True, kw_only=True)
class TrainingFeatures:
    """Stored tokens of a frozen frame encoder that a training uses in place of frames."""

    store: Annotated[tuple[str, ...], FieldMark.LOCATION, FieldMark.OPERATIONAL] = ()
    """Folders with the stored tokens of all frames, written by jobs.features: one for each data
    set, in the same order. Empty encodes the frames in every step."""
    val_store: Annotated[
        str | None, FieldMark.LOCATION, FieldMark.VALIDATION, FieldMark.OPERATIONAL
    ] = None
    """Folder with the stored tokens of the validation clips, without views. None takes the one of
    the first data set for clips that are held out of it, and otherwise encodes the frames."""
    views: int | None = None
    """Number of stored views of each clip to draw from, for a training with augmentation. None is
    for a training without."""


@dataclass(frozen=True, kw_only=True)
class EvaluationFeatures:
    """Stored tokens of a frame encoder that an evaluation uses in place of frames."""

    store: Annotated[str | None, FieldMark.LOCATION] = None
    """Folder with the stored tokens of all frames of data, written by jobs.features without views.
    None encodes the frames."""


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
    epoch_unit: EpochUnit = "captions"
    hold_out: int = 0
    hold_out_by: HoldOutBy = "video"
    similar_captions: int | None = None
    """Number of samples with similar captions that follow each other; None for a random order."""
    held_out: str | None = None
    """File that lists the held-out clips; without it, they are chosen again, with the same
    result."""
    captions: CaptionChoice = "original"
    """Which captions of each clip are used."""
    questions: str | None = None
    """Manifest with questions about the clips, which then take the place of captions."""
    answers: str | None = None
    """Answer vocabulary; questions whose answer is outside of it are left out."""
    texts_as_written: bool = False
    """Whether texts are tokenized without cleaning them first."""
    cache_dir: str | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES
    features: tuple[str, ...] = ()
    """Folders with the stored tokens of each data set's frames. Batches then say where the tokens
    of a clip are, and have no frames."""
    views: int | None = None
    """Number of stored views of a clip to draw from; None if its frames are stored as they are."""

    @property
    def window(self) -> int:
        """Number of samples that are read in another order than that of the plan."""
        return 0 if self.similar_captions is None else WINDOW
