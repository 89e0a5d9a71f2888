"""Settings of the manifest stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pipelines.common.config import require

ManifestFormat = Literal[
    "webvid",
    "vidal",
    "msrvtt",
    "didemo",
    "lsmdc",
    "msvd",
    "msrvtt_qa",
    "msvd_qa",
    "lavis",
    "alpro",
    "generic",
]


@dataclass(frozen=True, kw_only=True)
class ManifestConfig:
    """Convert annotations in a dataset's own format to a clip manifest."""

    annotations: tuple[str, ...]
    """Annotation files (paths or URIs). Some formats take a file of captions and a list of ids."""
    videos: str
    """Folder or S3 prefix that contains the videos."""
    output: str
    """Parquet file to write."""
    format: ManifestFormat = "webvid"
    """Format of the annotations."""
    split: str | None = None
    """Split name to record with every clip. None uses the split given in the annotations, or the
    format's default."""
    caption: str = ""
    """Caption to use from vidal annotations: raw, mplug, polish_mplug, sound_mplug, ofa0 to ofa7,
    or mix. Empty means polish_mplug. Other formats ignore it."""
    columns: tuple[str, ...] = ()
    """Column names in generic annotations, as NAME=COLUMN, such as caption=text video=file. Other
    formats ignore them."""

    def __post_init__(self) -> None:
        require(len(self.annotations) > 0, "annotations", self.annotations, "give a file")
