"""Reads LSMDC files: tab-separated despite ".csv", six fields per line, no header or quoting.

A clip is expected at <videos>/<movie>/<clip_id>.avi; the movie is the id without the times at its
end. Ids contain dots. A clip may have several sentences.
"""

from __future__ import annotations

import re

from pipelines.manifest.formats import opening, reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

NUM_FIELDS = 6
TIMES = re.compile(r"_\d\d\.\d\d\.\d\d\.\d{3}-\d\d\.\d\d\.\d\d\.\d{3}$")
MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each line; sentences of a clip are merged later."""
    files = source.finder(".avi")
    for file in source.annotations:
        for number, line in opening.lines(file):
            if isinstance(line, opening.Unreadable):
                yield BadRow(file=file, row=number, reason=line.reason)
                continue
            fields = line.split("\t")
            if len(fields) != NUM_FIELDS:
                reason = f"the line has {len(fields)} tab-separated fields, expected {NUM_FIELDS}"
                yield BadRow(file=file, row=number, reason=reason)
                continue
            clip_id, sentence = fields[0].strip(), fields[-1]
            movie = TIMES.sub("", clip_id)
            captions = reading.caption_list(sentence)
            if not clip_id or movie == clip_id:
                reason = f"clip id {clip_id!r} does not end with the start and end time"
                yield BadRow(file=file, row=number, reason=reason)
            elif not captions:
                yield BadRow(file=file, row=number, reason=f"{clip_id}: {reading.EMPTY}")
            else:
                yield ClipRow(
                    clip_id=clip_id,
                    video_id=clip_id,
                    video_uri=files.of_id(clip_id, folders=[movie]),
                    captions=captions,
                    split=source.split or "train",
                    source="lsmdc",
                    extras={"movie": movie},
                )
