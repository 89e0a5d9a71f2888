"""Reads LAVIS JSON, as STGT uses it: lists of {video, caption} or {video, question, answer}.

`video` is a path within the videos folder, an absolute path or a URI. An `image` is a clip of one
frame. A caption may be a string or a list. Several files are concatenated.
"""

from __future__ import annotations

from pipelines.manifest.formats import json_files, reading
from pipelines.manifest.formats.files import is_outside
from pipelines.manifest.formats.questions import question_row
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each row; rows of the same video are merged later."""
    files = source.finder()
    for file in source.annotations:
        for number, row in json_files.json_list(file):
            which = "image" if isinstance(row, dict) and "image" in row else "video"
            if reason := reading.require(row, (which,), (which,)):
                yield BadRow(file=file, row=number, reason=reason)
                continue
            video = str(row[which])
            if is_outside(video):
                reason = f"{video} is outside the videos folder"
                yield BadRow(file=file, row=number, reason=reason)
                continue
            uri = files.of_path(video)
            if "question" in row:
                if reason := reading.require(row, ("question", "answer")):
                    yield BadRow(file=file, row=number, reason=f"{video}: {reason}")
                    continue
                yield question_row(row, number, video, uri, source, "lavis")
            elif captions := reading.caption_list(row.get("caption")):
                yield ClipRow(
                    clip_id=video,
                    video_id=video,
                    video_uri=uri,
                    captions=captions,
                    split=source.split or "train",
                    source="lavis",
                )
            else:
                yield BadRow(file=file, row=number, reason=f"{video}: {reading.EMPTY}")
