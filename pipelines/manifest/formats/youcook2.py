"""Reads YouCook2: a JSON object whose `database` maps ids to annotations with segments.

Each segment is a clip. With `--caption paragraph`, each video is a clip whose caption is all of its
sentences. The file contains several splits; `--split train` or `--split val` selects one. Files in
the form of ActivityNet Captions are read with `--format activitynet`.
"""

from __future__ import annotations

from typing import Any

from pipelines.manifest.formats import dense, json_files, reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, Rows
from stgt.errors import ManifestError

SPLITS = {"training": "train", "validation": "val", "testing": "test"}
"""Names of the splits in the file, and the names that manifests use."""
EXTRAS = ("duration", "recipe_type")
MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each segment, or for each video.

    Raises:
        ManifestError: A file has no `database`, or the setting `caption` is unknown.
    """
    kind = dense.kind_of(source)
    files = source.finder(".mp4")
    for file in source.annotations:
        number = 0
        entries = json_files.json_object(file, "database")
        for number, (video_id, entry) in enumerate(entries, start=1):
            if reason := reading.require(entry, ()):
                yield BadRow(file=file, row=number, reason=f"{video_id}: {reason}")
                continue
            split = SPLITS.get(str(entry.get("subset")), str(entry.get("subset") or "train"))
            if source.split in SPLITS.values() and split != source.split:
                continue
            segments = entry.get("annotations")
            if not isinstance(segments, list) or not segments:
                yield BadRow(file=file, row=number, reason=f"{video_id}: it has no annotations")
                continue
            video = dense.DenseVideo(
                file=file,
                row=number,
                video_id=video_id,
                spans=[_field(segment, "segment") for segment in segments],
                sentences=[_field(segment, "sentence") for segment in segments],
                split=source.split or split,
                source="youcook2",
                extras={name: entry[name] for name in EXTRAS if name in entry},
            )
            yield from dense.clips(video, kind, files)
        if not number:
            raise ManifestError(
                f"{file} contains no object named database; for files in the form of ActivityNet "
                "Captions, use --format activitynet"
            )


def _field(segment: Any, name: str) -> Any:
    return segment.get(name) if isinstance(segment, dict) else None
