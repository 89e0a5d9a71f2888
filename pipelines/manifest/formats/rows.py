"""Input and output types of annotation readers: the source, clips, and rejected rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pipelines.manifest.formats.files import AmbiguousVideo, VideoFinder


@dataclass(frozen=True, kw_only=True)
class AnnotationSource:
    """Files and settings that a reader needs."""

    annotations: tuple[str, ...]
    """URIs of annotation files, in the given order."""
    videos: tuple[str, ...]
    """Folders or prefixes of the videos."""
    split: str | None
    """Name of the split; None uses the split in the annotations or the format's default."""
    caption: str
    """Kind of caption to use, for formats with several kinds."""
    columns: dict[str, str] = field(default_factory=dict)
    """Maps standard column names to the names in the file, for generic files."""
    media: str = ""
    """Folder for videos that are stored in the annotations themselves."""
    finders: list[VideoFinder] = field(default_factory=list)
    """The lookups that the reader uses."""

    def __post_init__(self) -> None:
        if isinstance(self.videos, str):
            # Callers of earlier versions give one folder.
            object.__setattr__(self, "videos", (self.videos,))

    def finder(self, extension: str = "", **rule: bool) -> VideoFinder:
        """Return a lookup of the videos; see `VideoFinder` for the arguments."""
        finder = VideoFinder(self.videos, extension, **rule)
        self.finders.append(finder)
        return finder


@dataclass(frozen=True, kw_only=True)
class ClipRow:
    """A clip of a manifest, or part of one if the format has several rows per clip."""

    clip_id: str
    video_id: str
    video_uri: str | AmbiguousVideo
    captions: list[str]
    split: str
    source: str
    start_s: float | None = None
    end_s: float | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    """Other values from the annotations. If rows of a clip are merged, lists are joined."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used."""

    file: str
    row: int | None
    """Row number, counted from 1 without the header; None if the file is a video."""
    reason: str

    def __str__(self) -> str:
        place = self.file if self.row is None else f"row {self.row} of {self.file}"
        return f"{place}: {self.reason}"


Rows: TypeAlias = Iterator[ClipRow | BadRow]
