"""What a reader is given and what it yields: clips, and rows it cannot use with the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias


@dataclass(frozen=True, kw_only=True)
class AnnotationSource:
    """What a reader reads."""

    annotations: tuple[str, ...]
    """Annotation files (URIs), in the order they were given."""
    videos: str
    """Folder or prefix of the videos."""
    split: str | None
    """Name of the split; None where the annotations tell it."""
    caption: str
    """Which caption of several kinds to take, for formats that have them."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns, for generic files: ours to theirs."""


@dataclass(frozen=True, kw_only=True)
class ClipRow:
    """One clip of a manifest, or a part of one where a format has several rows for a clip."""

    clip_id: str
    video_id: str
    video_uri: str
    captions: list[str]
    split: str
    source: str
    start_s: float | None = None
    end_s: float | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    """Whatever else the annotations say. Lists of the rows of a clip are joined."""


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used."""

    file: str
    row: int
    """Counted from 1, the header not included."""
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} of {self.file}: {self.reason}"


Rows: TypeAlias = Iterator[ClipRow | BadRow]
