"""LSMDC: tab-separated files without header or quoting, six fields a line, in spite of ".csv".

A clip lies at <videos>/<movie>/<clip_id>.avi; the movie is the id without the times at its end.
Ids hold dots. A clip may have several sentences.
"""

from __future__ import annotations

import re

from pipelines.common import storage
from pipelines.manifest.formats import reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

NUM_FIELDS = 6
TIMES = re.compile(r"_\d\d\.\d\d\.\d\d\.\d{3}-\d\d\.\d\d\.\d\d\.\d{3}$")
MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each line; sentences of a clip are merged."""
    for file in source.annotations:
        for number, line in reading.lines(file):
            fields = line.split("\t")
            if len(fields) != NUM_FIELDS:
                reason = f"{len(fields)} fields between tabs, expected {NUM_FIELDS}"
                yield BadRow(file=file, row=number, reason=reason)
                continue
            clip_id, sentence = fields[0].strip(), fields[-1]
            movie = TIMES.sub("", clip_id)
            captions = reading.caption_list(sentence)
            if not clip_id or movie == clip_id:
                reason = f"clip id {clip_id!r} does not end in its times"
                yield BadRow(file=file, row=number, reason=reason)
            elif not captions:
                yield BadRow(file=file, row=number, reason=f"{clip_id}: {reading.EMPTY}")
            else:
                yield ClipRow(
                    clip_id=clip_id,
                    video_id=clip_id,
                    video_uri=storage.join(source.videos, movie, f"{clip_id}.avi"),
                    captions=captions,
                    split=source.split or "train",
                    source="lsmdc",
                    extras={"movie": movie},
                )
