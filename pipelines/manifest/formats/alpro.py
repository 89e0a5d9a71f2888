"""Reads ALPRO JSON lines: {clip_name, caption} for retrieval, {video_id, question, answer} for QA.

A video is at <videos>/<name>.mp4, or the same name with another extension.
"""

from __future__ import annotations

from pipelines.manifest.formats import json_files, opening, reading
from pipelines.manifest.formats.questions import question_row
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each line; lines of the same video are merged later.

    Raises:
        ManifestError: A file is a pickle, as in ALPRO's pretraining sets.
    """
    files = source.finder(".mp4", first_dot=True, takes_first=True)
    for file in source.annotations:
        if opening.extension(file) in ("pkl", "pickle"):
            raise ManifestError(
                f"{file}: reading a pickled table could execute code; convert it to CSV and use "
                "--format generic"
            )
        for number, row in json_files.json_lines(file):
            name = "video_id" if isinstance(row, dict) and "question" in row else "clip_name"
            if reason := reading.require(row, (name,), (name,)):
                yield BadRow(file=file, row=number, reason=reason)
                continue
            stem = files.stem(str(row[name]))
            if name == "video_id":
                if reason := reading.require(row, ("question", "answer")):
                    yield BadRow(file=file, row=number, reason=reason)
                    continue
                yield question_row(row, number, stem, files.of_id(stem), source, "alpro")
            elif captions := reading.caption_list(row.get("caption")):
                yield ClipRow(
                    clip_id=stem,
                    video_id=stem,
                    video_uri=files.of_id(stem),
                    captions=captions,
                    split=source.split or "train",
                    source="alpro",
                    extras={key: row[key] for key in ("sen_id", "retrieval_key") if key in row},
                )
            else:
                yield BadRow(file=file, row=number, reason=f"{stem}: {reading.EMPTY}")
