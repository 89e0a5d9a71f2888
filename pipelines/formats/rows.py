"""What a reader yields: clips, and rows it cannot use with the reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ClipRow:
    """One clip of a manifest."""

    clip_id: str
    video_id: str
    video_uri: str
    captions: list[str]
    split: str
    source: str
    start_s: float | None = None
    end_s: float | None = None
    extras: str = "{}"


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """A row that cannot be used."""

    file: str
    row: int
    """Counted from 1, the header not included."""
    reason: str

    def __str__(self) -> str:
        return f"row {self.row} of {self.file}: {self.reason}"
