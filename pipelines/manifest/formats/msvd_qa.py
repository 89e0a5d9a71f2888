"""Reads MSVD-QA as published: a list of {id, video_id (a number), question, answer} and a mapping.

youtube_mapping.txt maps clip ids to these numbers, with lines "<clip id> vidN". A video is at
<videos>/<clip id>.avi.
"""

from __future__ import annotations

from pipelines.manifest.formats import json_files, opening, reading
from pipelines.manifest.formats.questions import question_row
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, Rows
from stgt.errors import ManifestError

MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a row for each question; questions of a clip are merged later.

    Raises:
        ManifestError: The mapping is not among the files.
    """
    files = source.finder(".avi", first_dot=True, takes_first=True)
    mappings = [file for file in source.annotations if opening.extension(file) == "txt"]
    if not mappings:
        raise ManifestError(
            f"{', '.join(source.annotations)}: video numbers need youtube_mapping.txt; also give "
            "this file"
        )
    clip_of: dict[str, str] = {}
    for file in mappings:
        for place, line in opening.lines(file):
            if isinstance(line, opening.Unreadable):
                yield BadRow(file=file, row=place, reason=line.reason)
                continue
            clip_id, _, number = line.strip().rpartition(" vid")
            clip_of[number] = clip_id
    for file in source.annotations:
        if file in mappings:
            continue
        for number, row in json_files.json_list(file):
            if reason := reading.require(row, ("question", "answer", "video_id"), ("video_id",)):
                yield BadRow(file=file, row=number, reason=reason)
                continue
            clip_id = clip_of.get(str(row["video_id"]))
            if clip_id is None:
                reason = f"video {row['video_id']} is not in {', '.join(mappings)}"
                yield BadRow(file=file, row=number, reason=reason)
                continue
            yield question_row(row, number, clip_id, files.of_id(clip_id), source, "msvd_qa")
