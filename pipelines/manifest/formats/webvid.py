"""Reads WebVid CSV files, results_{2M,10M}_{train,val}.csv, with columns in any order.

A video is expected at <videos>/<page_dir>/<videoid>.mp4. Ids and folders are read as text to keep
leading zeros.
"""

from __future__ import annotations

from typing import Any

from pipelines.manifest.formats import csv_tables, opening, reading
from pipelines.manifest.formats.files import VideoFinder
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

COLUMNS = ("videoid", "page_dir", "name")
EXTRA_COLUMNS = ("contentUrl", "duration", "page_idx")
MAX_CAPTION_CHARACTERS = 350
"""Maximum length of a caption; longer ones are truncated as in the published WebVid reader."""
MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield a clip or a rejected row for each line.

    Raises:
        ManifestError: A file is missing, is not UTF-8, or lacks a column.
    """
    files = source.finder(".mp4")
    for file in source.annotations:
        for number, row in csv_tables.csv_rows(file, COLUMNS, used=(*COLUMNS, *EXTRA_COLUMNS)):
            yield _clip(row, number, file, source, files)


def _clip(
    row: Any, number: int, file: str, source: AnnotationSource, files: VideoFinder
) -> ClipRow | BadRow:
    def bad(reason: str) -> BadRow:
        return BadRow(file=file, row=number, reason=reason)

    if isinstance(row, opening.Unreadable):
        return bad(row.reason)
    values = {name: (row.get(name) or "").strip() for name in COLUMNS}
    if any("\n" in (row.get(name) or "") for name in COLUMNS):
        return bad("a field spans several lines: a quote may be unclosed")
    for name in ("videoid", "page_dir"):
        if not values[name] or values[name].lower() == "nan":
            return bad(f"{name} is empty")
    if ".." in values["page_dir"].split("/") or "/" in values["videoid"]:
        return bad("videoid or page_dir points outside the videos folder")
    name = reading.decode_entities(values["name"])
    captions = reading.caption_list(name[:MAX_CAPTION_CHARACTERS])
    if not captions:
        return bad(reading.EMPTY)
    video_id = values["videoid"]
    return ClipRow(
        clip_id=video_id,
        video_id=video_id,
        video_uri=files.of_id(video_id, folders=[values["page_dir"]]),
        captions=captions,
        split=source.split or "train",
        source="webvid",
        extras={name: row[name] for name in EXTRA_COLUMNS if row.get(name)},
    )
