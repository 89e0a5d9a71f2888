"""Reads InternVid: JSON lines, CSV or Parquet with one row per clip.

Columns are YoutubeID, Start_timestamp, End_timestamp and Caption. A clip is the file that is named
after its video and times, if there is one, and otherwise a span of the file that is named after the
video.
"""

from __future__ import annotations

from typing import Any

from pipelines.manifest.formats import reading, tables, values
from pipelines.manifest.formats.files import VideoFinder
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

COLUMNS = ("YoutubeID", "Start_timestamp", "End_timestamp", "Caption")
MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield a clip or a rejected row for each row."""
    files = source.finder(".mp4")
    for file in source.annotations:
        for number, row in tables.rows(file, COLUMNS):
            reason = reading.require(row, COLUMNS[:1], COLUMNS[:1])
            if reason is None:
                try:
                    yield _clip(row, source, files)
                    continue
                except ValueError as error:
                    reason = f"{row['YoutubeID']}: {error}"
            yield BadRow(file=file, row=number, reason=reason)


def _clip(row: dict[str, Any], source: AnnotationSource, files: VideoFinder) -> ClipRow:
    video_id = str(row["YoutubeID"])
    span = [row.get("Start_timestamp"), row.get("End_timestamp")]
    start, end = values.span(span, "timestamp")
    captions = reading.caption_list(row.get("Caption"))
    if not captions:
        raise ValueError(reading.EMPTY)
    clip_id = f"{video_id}_{span[0]}_{span[1]}"
    is_cut = files.has_id(clip_id)
    return ClipRow(
        clip_id=clip_id,
        video_id=video_id,
        video_uri=files.of_id(clip_id if is_cut else video_id),
        captions=captions,
        split=source.split or "train",
        source="internvid",
        start_s=None if is_cut else start,
        end_s=None if is_cut else end,
        extras={name: value for name, value in row.items() if name not in COLUMNS},
    )
