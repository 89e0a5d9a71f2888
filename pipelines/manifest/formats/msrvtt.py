"""Reads MSR-VTT: MSRVTT_data.json, optionally with lists of ids, or MSRVTT_JSFUSION_test.csv.

A file is recognized by its contents: a JSON object with `sentences`; a CSV with the columns
video_id and sentence (the 1k-A test split: one caption per video); or a list of ids, as text or as
a CSV with only video_id, which selects videos of the JSON. Without such a list, `split` selects
videos by the split names in the JSON. A video is at <videos>/videoN.mp4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from pipelines.manifest.formats import csv_tables, json_files, opening, reading
from pipelines.manifest.formats.files import VideoFinder
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

OWN_SPLITS = {"train": "train", "val": "validate", "validate": "validate", "test": "test"}
MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each sentence; sentences of a video are merged later.

    Raises:
        ManifestError: The captions are missing, or the split is unknown.
    """
    files = source.finder(".mp4", first_dot=True, takes_first=True)
    captions: list[str] = []
    wanted: set[str] | None = None
    for file in source.annotations:
        if opening.first_character(file) == "{":
            captions.append(file)
        elif _has_sentences(file):
            yield from _pairs(file, source, files)
        else:
            wanted = wanted or set()
            for number, line in opening.lines(file):
                if isinstance(line, opening.Unreadable):
                    yield BadRow(file=file, row=number, reason=line.reason)
                elif number > 1 or line.strip() != "video_id":
                    wanted.add(line.strip())
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
    _, header = next(opening.lines(file), (0, ""))
    return isinstance(header, str) and "sentence" in re.split(r"[,\t;|]", header)


def _pairs(file: str, source: AnnotationSource, files: VideoFinder) -> Rows:
    columns = ("video_id", "sentence")
    for number, row in csv_tables.csv_rows(file, columns, used=columns):
        if reason := reading.require(row, columns[:1]):
            yield BadRow(file=file, row=number, reason=reason)
            continue
        assert not isinstance(row, opening.Unreadable)
        captions = reading.caption_list(row["sentence"])
        if not captions:
            yield BadRow(file=file, row=number, reason=f"{row['video_id']}: {reading.EMPTY}")
            continue
        yield _clip(str(row["video_id"]), captions, source.split or "test", files)


def _sentences(
    file: str, source: AnnotationSource, files: VideoFinder, wanted: set[str] | None
) -> Rows:
    if wanted is None and source.split is not None:
        own = OWN_SPLITS.get(source.split)
        if own is None:
            raise ManifestError(
                f"split = {source.split!r}: {file} contains the splits "
                f"{', '.join(sorted(OWN_SPLITS))}; for another split, give its list of ids as a "
                "second annotation file"
            )
        videos = json_files.json_list(file, "videos.item")
        wanted = {
            str(video.get("video_id"))
            for _, video in videos
            if isinstance(video, dict) and video.get("split") == own
        }
    for number, sentence, name in _entries(file):
        if reason := reading.require(sentence, (name,), (name,)):
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
        for number, sentence in json_files.json_list(file, prefix):
            yield number, sentence, name


def _clip(video_id: str, captions: list[str], split: str, files: VideoFinder) -> ClipRow:
    return ClipRow(
        clip_id=video_id,
        video_id=video_id,
        video_uri=files.of_id(video_id),
        captions=captions,
        split=split,
        source="msrvtt",
    )
