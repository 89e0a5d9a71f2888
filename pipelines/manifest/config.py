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
    """Annotations in a data set's own format -> a clip manifest."""

    annotations: tuple[str, ...]
    """Annotation files (paths or URIs); some formats take captions and a list of ids."""
    videos: str
    """Folder or S3 prefix that holds the videos."""
    output: str
    """The Parquet file to write."""
    format: ManifestFormat = "webvid"
    """Format of the annotations."""
    split: str | None = None
    """Name of the split, kept with every clip; None takes what the annotations say, or train."""
    caption: str = ""
    """vidal: which caption (raw, mplug, polish_mplug, sound_mplug, ofa0 to ofa7, mix)."""
    columns: tuple[str, ...] = ()
    """generic: names of columns, as ours=theirs, e.g. caption=text video=file."""

    def __post_init__(self) -> None:
        require(len(self.annotations) > 0, "annotations", self.annotations, "name a file")
