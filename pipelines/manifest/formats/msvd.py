"""Reads MSVD: captions by clip id (JSON of strings, or raw-captions.pkl of words) and lists of ids.

If there is a list ({train,val,test}_list.txt), only its clips are kept. A video is at
<videos>/<id>.avi; ids may start with "-".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.manifest.formats import json_files, opening, reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

CAPTIONS = ("json", "pkl", "pickle")
MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield one clip per id, with all of its captions.

    Raises:
        ManifestError: No file contains captions.
    """
    files = source.finder(".avi", first_dot=True, takes_first=True)
    captions = [file for file in source.annotations if opening.extension(file) in CAPTIONS]
    lists = [file for file in source.annotations if file not in captions]
    if not captions:
        raise ManifestError(
            f"{', '.join(source.annotations)}: there are no captions; also give "
            "captions_msvd.json or raw-captions.pkl"
        )
    wanted: set[str] | None = set() if lists else None
    for file in lists:
        for number, line in opening.lines(file):
            if isinstance(line, opening.Unreadable):
                yield BadRow(file=file, row=number, reason=line.reason)
            elif wanted is not None:
                wanted.add(line.strip())
    missing = set(wanted or ())
    for file in captions:
        for number, (clip_id, value) in enumerate(_entries(file), start=1):
            if wanted is not None and clip_id not in wanted:
                continue
            missing.discard(clip_id)
            if isinstance(value, opening.Unreadable):
                yield BadRow(file=file, row=number, reason=f"{clip_id}: {value.reason}")
                continue
            texts = value if isinstance(value, list | tuple) else [value]
            usable = reading.caption_list(
                [" ".join(map(str, text)) if isinstance(text, list) else text for text in texts]
            )
            if not usable:
                yield BadRow(file=file, row=number, reason=f"{clip_id}: {reading.EMPTY}")
                continue
            yield ClipRow(
                clip_id=clip_id,
                video_id=clip_id,
                video_uri=files.of_id(clip_id),
                captions=usable,
                split=source.split or "train",
                source="msvd",
            )
    for number, clip_id in enumerate(sorted(missing), start=1):
        reason = f"{clip_id}: the clip is in the list but has no captions"
        yield BadRow(file=lists[0], row=number, reason=reason)


def _entries(file: str) -> Iterator[tuple[str, Any]]:
    if opening.extension(file) == "json":
        yield from json_files.json_object(file)
        return
    values = reading.plain_pickle(file)
    if not isinstance(values, dict):
        raise ManifestError(
            f"{file} contains a {type(values).__name__} instead of a dict of captions by clip id"
        )
    yield from values.items()
