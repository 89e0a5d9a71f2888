"""What has to be known about a video to cut it, and the files that keep it during a run.

Layout of the folder, `NAME.cuts/KEY` beside the manifest, where KEY is a hash of all that the facts
depend on:
    videos.parquet    the videos, in the order of a hash of their URIs
    parts/00012.json  the facts of a part of them, written at once
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypedDict

from pipelines.common import storage

VIDEOS = "videos.parquet"
PARTS = "parts"
MOST_PARTS = 2000
"""More would burden Ray's driver."""
FEWEST_OF_A_PART = {"windows": 64, "shots": 1}
"""Smallest number of videos in a part. A part that was interrupted is done again."""


class VideoFacts(TypedDict):
    """Facts of a video."""

    video_uri: str
    version: str | None
    """Text that changes when the video or its subtitles are rewritten; None if it is not known."""
    duration_s: float | None
    """None if it was not needed or could not be found."""
    cuts_s: list[float]
    """Ascending times at which another shot begins, in seconds."""
    cues: list[tuple[float, float, str]] | None
    """Start, end and text of each subtitle; None without a file of subtitles."""
    broken_cues: int
    """Number of subtitles whose times cannot be read."""
    num_decoded: int
    """Number of frames that were decoded."""
    reason: str | None
    """Why the video cannot be used; None if it can."""
    message: str


def part_size(num_videos: int, cut: str) -> int:
    """Return the number of videos of a part. It does not depend on the number of workers."""
    return max(FEWEST_OF_A_PART[cut], math.ceil(num_videos / MOST_PARTS))


def num_parts(num_videos: int, cut: str) -> int:
    """Return the number of parts."""
    return math.ceil(num_videos / part_size(num_videos, cut))


def part_uri(folder: str, part: int) -> str:
    """Return the URI of the facts of a part."""
    return storage.join(folder, PARTS, f"{part:05d}.json")


def read_part(folder: str, part: int) -> list[VideoFacts] | None:
    """Return the facts of a part; None if they are not there yet."""
    uri = part_uri(folder, part)
    return storage.read_json(uri) if storage.exists(uri) else None


def read_all(folder: str, parts: int) -> Iterator[VideoFacts]:
    """Iterate over the facts of all videos, in their order."""
    for part in range(parts):
        yield from storage.read_json(part_uri(folder, part))


def unknown(video_uri: str) -> VideoFacts:
    """Return the facts of a video about which nothing is known."""
    return VideoFacts(
        video_uri=video_uri,
        version=None,
        duration_s=None,
        cuts_s=[],
        cues=None,
        broken_cues=0,
        num_decoded=0,
        reason=None,
        message="",
    )
