"""What becomes of a URL: its video is in its place, or there is a reason why it is not."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.fetch.config import FetchReason


@dataclass(frozen=True)
class Fetched:
    """A video that is in its place."""

    file: str
    """Path below the output folder."""
    size_bytes: int
    checksum: str
    """In hexadecimal digits, by the algorithm that the settings name."""


@dataclass(frozen=True)
class Failed:
    """A video that could not be fetched."""

    reason: FetchReason
    message: str
    is_silent: bool = False
    """Whether the host has not answered."""
    nothing_came: bool = False
    """Whether nothing came back, as if there were no network: not even that the name is unknown or
    that the host refuses connections."""
