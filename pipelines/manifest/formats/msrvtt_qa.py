"""Reads MSRVTT-QA: JSON lines {question, answer, video_id, answer_type} for videos videoN.mp4."""

from __future__ import annotations

from pipelines.manifest.formats import json_files, reading
from pipelines.manifest.formats.questions import question_row
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, Rows

MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a row for each question; questions of a video are merged later."""
    files = source.finder(".mp4", first_dot=True, takes_first=True)
    for file in source.annotations:
        for number, row in json_files.json_lines(file):
            if reason := reading.require(row, ("question", "answer", "video_id"), ("video_id",)):
                yield BadRow(file=file, row=number, reason=reason)
                continue
            video_id = str(row["video_id"])
            yield question_row(row, number, video_id, files.of_id(video_id), source, "msrvtt_qa")
