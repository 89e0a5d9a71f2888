"""Reads Panda-70M CSV files: one row per video, with lists of time spans, captions and scores.

The lists are written as Python literals: timestamp is `[['0:00:07.007', '0:00:11.011'], ...]`, and
caption and matching_score have as many entries. Each entry is a clip. A video is the file whose
stem is `videoID`.
"""

from __future__ import annotations

import ast
from typing import Any

from pipelines.manifest.formats import reading, tables, values
from pipelines.manifest.formats.files import VideoFinder
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

COLUMNS = ("videoID", "timestamp", "caption")
SCORES = ("matching_score", "desirable_filtering", "shot_boundary_detection")
"""Columns with one value per clip, which are kept as extras if they are there."""
MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield a clip, or a rejected row, for each time span of each row."""
    files = source.finder(".mp4")
    for file in source.annotations:
        for number, row in tables.rows(file, COLUMNS):
            reason = reading.require(row, COLUMNS, ("videoID",))
            if reason is not None:
                yield BadRow(file=file, row=number, reason=reason)
                continue
            video_id = str(row["videoID"])
            try:
                lists = {name: _entries(row[name], name) for name in COLUMNS[1:]}
                scores = {name: _entries(row[name], name) for name in SCORES if row.get(name)}
                _check_lengths({**lists, **scores})
            except ValueError as error:
                yield BadRow(file=file, row=number, reason=f"{video_id}: {error}")
                continue
            for place, (span, caption) in enumerate(
                zip(lists["timestamp"], lists["caption"], strict=True)
            ):
                extras = {name: entries[place] for name, entries in scores.items()}
                try:
                    yield _clip(video_id, place, span, caption, extras, source, files)
                except ValueError as error:
                    reason = f"{video_id}: entry {place + 1}: {error}"
                    yield BadRow(file=file, row=number, reason=reason)


def _entries(value: Any, name: str) -> list[Any]:
    """Return a list that is written as a Python literal."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(f"{name} is not a list: {type(error).__name__}: {error}") from error
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name} is not a list")  # noqa: TRY004
    return list(value)


def _check_lengths(lists: dict[str, list[Any]]) -> None:
    if len({len(entries) for entries in lists.values()}) > 1:
        counts = ", ".join(f"{name} has {len(entries)}" for name, entries in lists.items())
        raise ValueError(f"the lists differ in length: {counts}")


def _clip(
    video_id: str,
    place: int,
    span: Any,
    caption: Any,
    extras: dict[str, Any],
    source: AnnotationSource,
    files: VideoFinder,
) -> ClipRow:
    start, end = values.span(span, "timestamp")
    captions = reading.caption_list(caption)
    if not captions:
        raise ValueError(reading.EMPTY)
    return ClipRow(
        clip_id=f"{video_id}_{place:05d}",
        video_id=video_id,
        video_uri=files.of_id(video_id),
        captions=captions,
        split=source.split or "train",
        source="panda70m",
        start_s=start,
        end_s=end,
        extras=extras,
    )
