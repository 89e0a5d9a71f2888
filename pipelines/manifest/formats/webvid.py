"""Reads WebVid CSV files, results_{2M,10M}_{train,val}.csv, with columns in any order.

A video is at <videos>/<page_dir>/<videoid>.mp4. Ids and folders are read as text to keep leading
zeros.
"""

from __future__ import annotations

from pipelines.common import storage
from pipelines.manifest.formats import reading
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
    for file in source.annotations:
        for number, row in reading.csv_rows(file, COLUMNS):
            yield _clip(row, number, file, source)


def _clip(
    row: dict[str, str], number: int, file: str, source: AnnotationSource
) -> ClipRow | BadRow:
    values = {name: (row.get(name) or "").strip() for name in COLUMNS}

    def bad(reason: str) -> BadRow:
        return BadRow(file=file, row=number, reason=reason)

    if any("\n" in (row.get(name) or "") for name in COLUMNS):
        return bad("a field spans several lines: a quote may be unclosed")
    for name in ("videoid", "page_dir"):
        if not values[name] or values[name].lower() == "nan":
            return bad(f"{name} is empty")
    if ".." in values["page_dir"].split("/") or "/" in values["videoid"]:
        return bad("videoid or page_dir points outside the videos folder")
    captions = reading.caption_list(values["name"][:MAX_CAPTION_CHARACTERS])
    if not captions:
        return bad(reading.EMPTY)
    video_id = values["videoid"]
    return ClipRow(
        clip_id=video_id,
        video_id=video_id,
        video_uri=storage.join(source.videos, values["page_dir"], f"{video_id}.mp4"),
        captions=captions,
        split=source.split or "train",
        source="webvid",
        extras={name: row[name] for name in EXTRA_COLUMNS if row.get(name)},
    )
