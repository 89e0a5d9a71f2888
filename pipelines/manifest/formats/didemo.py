"""Reads DiDeMo {train,val,test}_data.json, joining all descriptions of a video to one paragraph.

Descriptions are joined in file order. A video is identified by its name up to the first dot,
because the same video occurs with two extensions, and extensions are arbitrary, even "null".
"""

from __future__ import annotations

from pipelines.manifest.formats import json_files, reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield one clip per video, captioned with the paragraph of its descriptions."""
    files = source.finder(".mp4", first_dot=True, takes_first=True)
    sentences: dict[str, list[str]] = {}
    for file in source.annotations:
        for number, entry in json_files.json_list(file):
            if reason := reading.require(entry, ("video", "description"), ("video",)):
                yield BadRow(file=file, row=number, reason=reason)
                continue
            described = reading.caption_list(entry["description"])
            stem = files.stem(str(entry["video"]))
            if not described or not stem:
                reason = reading.EMPTY if stem else f"video {entry['video']!r} has no name"
                yield BadRow(file=file, row=number, reason=reason)
                continue
            sentences.setdefault(stem, []).append(" ".join(" ".join(described).split()))
    for stem, descriptions in sentences.items():
        yield ClipRow(
            clip_id=stem,
            video_id=stem,
            video_uri=files.of_id(stem),
            captions=[" ".join(descriptions)],
            split=source.split or "train",
            source="didemo",
            extras={"num_descriptions": len(descriptions)},
        )
