"""DiDeMo: {train,val,test}_data.json, descriptions of moments; retrieval takes them as paragraphs.

All descriptions of a video are joined in file order. A video is what stands before the first dot of
its name: the same one occurs under two extensions, and names end in anything, "null" included. The
file is found by that stem.
"""

from __future__ import annotations

from pipelines.manifest.formats import reading
from pipelines.manifest.formats.files import VideoFiles
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield one clip a video, its caption the paragraph of all its descriptions."""
    files = VideoFiles(source.videos, ".mp4")
    sentences: dict[str, list[str]] = {}
    for file in source.annotations:
        for number, entry in reading.json_list(file):
            if reason := reading.require(entry, ("video", "description")):
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
            video_uri=files.uri(stem),
            captions=[" ".join(descriptions)],
            split=source.split or "train",
            source="didemo",
            extras={"num_descriptions": len(descriptions)},
        )
