"""Reads ActivityNet Captions: a JSON object of {duration, timestamps, sentences} by video id.

Each sentence is a clip. With `--caption paragraph`, each video is a clip whose caption is all of
its sentences, as in paragraph-to-video retrieval. The validation files val_1 and val_2 describe the
same videos and may be given together. YouCook2 is published in the same form as well.
"""

from __future__ import annotations

from pipelines.manifest.formats import dense, json_files, reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, Rows

FIELDS = ("timestamps", "sentences")
MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each sentence, or for each video.

    Raises:
        ManifestError: A file is not a JSON object, or the setting `caption` is unknown.
    """
    kind = dense.kind_of(source)
    files = source.finder(".mp4")
    for file in source.annotations:
        for number, (video_id, entry) in enumerate(json_files.json_object(file), start=1):
            if reason := reading.require(entry, FIELDS):
                yield BadRow(file=file, row=number, reason=f"{video_id}: {reason}")
                continue
            if not all(isinstance(entry[name], list) for name in FIELDS):
                reason = f"{video_id}: {' and '.join(FIELDS)} must be lists"
                yield BadRow(file=file, row=number, reason=reason)
                continue
            video = dense.DenseVideo(
                file=file,
                row=number,
                video_id=video_id,
                spans=entry["timestamps"],
                sentences=entry["sentences"],
                split=source.split or "train",
                source="activitynet",
                extras={"duration": entry["duration"]} if "duration" in entry else {},
            )
            yield from dense.clips(video, kind, files)
