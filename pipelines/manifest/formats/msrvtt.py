"""Reads MSR-VTT: MSRVTT_data.json, optionally with lists of ids, or MSRVTT_JSFUSION_test.csv.

A file is recognized by its contents: a JSON object with `sentences`; a CSV with the columns
video_id and sentence (the 1k-A test split: one caption per video); or a list of ids, as text or as
a CSV with only video_id, which selects videos of the JSON. Without such a list, `split` selects
videos by the split names in the JSON. A video is at <videos>/videoN.mp4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.manifest.formats import reading
from pipelines.manifest.formats.files import VideoFiles
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

OWN_SPLITS = {"train": "train", "val": "validate", "validate": "validate", "test": "test"}
MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each sentence; sentences of a video are merged later.

    Raises:
        ManifestError: The captions are missing, or the split is unknown.
    """
    files = VideoFiles(source.videos, ".mp4")
    captions: list[str] = []
    wanted: set[str] | None = None
    for file in source.annotations:
        if reading.first_character(file) == "{":
            captions.append(file)
        elif _has_sentences(file):
            yield from _pairs(file, source, files)
        else:
            wanted = (wanted or set()) | set(_ids(file))
    if wanted is not None and not captions:
        raise ManifestError(
            f"{', '.join(source.annotations)}: a list of ids without captions; also give "
            "MSRVTT_data.json"
        )
    missing = set(wanted or ())
    for file in captions:
        for row in _sentences(file, source, files, wanted):
            if isinstance(row, ClipRow):
                missing.discard(row.clip_id)
            yield row
    for number, video_id in enumerate(sorted(missing), start=1):
        reason = f"{video_id}: the video is in the list of ids but has no captions"
        yield BadRow(file=", ".join(captions), row=number, reason=reason)


def _has_sentences(file: str) -> bool:
    _, header = next(reading.lines(file), (0, ""))
    return "sentence" in header.split(",")


def _ids(file: str) -> list[str]:
    ids = [line.strip() for _, line in reading.lines(file)]
    return ids[1:] if ids[:1] == ["video_id"] else ids


def _pairs(file: str, source: AnnotationSource, files: VideoFiles) -> Rows:
    for number, row in reading.csv_rows(file, ("video_id", "sentence")):
        captions = reading.caption_list(row["sentence"])
        if not row["video_id"] or not captions:
            yield BadRow(file=file, row=number, reason=reading.EMPTY)
            continue
        yield _clip(row["video_id"], captions, source.split or "test", files)


def _sentences(
    file: str, source: AnnotationSource, files: VideoFiles, wanted: set[str] | None
) -> Rows:
    if wanted is None and source.split is not None:
        own = OWN_SPLITS.get(source.split)
        if own is None:
            raise ManifestError(
                f"split = {source.split!r}: {file} contains the splits "
                f"{', '.join(sorted(OWN_SPLITS))}; for another split, give its list of ids as a "
                "second annotation file"
            )
        videos = reading.json_list(file, "videos.item")
        wanted = {str(video.get("video_id")) for _, video in videos if video.get("split") == own}
    for number, sentence, name in _entries(file):
        if reason := reading.require(sentence, (name,)):
            yield BadRow(file=file, row=number, reason=reason)
            continue
        video_id = str(sentence[name])
        if wanted is not None and video_id not in wanted:
            continue
        captions = reading.caption_list(sentence.get("caption"))
        if not captions:
            yield BadRow(file=file, row=number, reason=f"{video_id}: {reading.EMPTY}")
            continue
        yield _clip(video_id, captions, source.split or "train", files)


def _entries(file: str) -> Iterator[tuple[int, Any, str]]:
    """Yield the number and value of each sentence, and the key of its video id.

    Older copies of the file have `annotations` with `image_id` instead of `sentences`.
    """
    for prefix, name in (("sentences.item", "video_id"), ("annotations.item", "image_id")):
        for number, sentence in reading.json_list(file, prefix):
            yield number, sentence, name


def _clip(video_id: str, captions: list[str], split: str, files: VideoFiles) -> ClipRow:
    return ClipRow(
        clip_id=video_id,
        video_id=video_id,
        video_uri=files.uri(video_id),
        captions=captions,
        split=split,
        source="msrvtt",
    )
