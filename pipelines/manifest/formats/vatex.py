"""Reads VATEX: a JSON list of {videoID, enCap, chCap}, where enCap holds ten English captions.

`videoID` is a YouTube id with the start and the end in seconds, such as Ptf_2VRj-V0_000122_000132.
A clip is the file of that name, or a span of the file that is named after the YouTube id.
"""

from __future__ import annotations

import re

from pipelines.manifest.formats import json_files, reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows

CUT = re.compile(r"(?P<video>.+)_(?P<start>\d{6})_(?P<end>\d{6})")
MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each entry, with its English captions; Chinese ones are kept as extras."""
    files = source.finder(".mp4")
    for file in source.annotations:
        for number, entry in json_files.json_list(file):
            if reason := reading.require(entry, ("videoID",), ("videoID",)):
                yield BadRow(file=file, row=number, reason=reason)
                continue
            clip_id = str(entry["videoID"])
            captions = reading.caption_list(entry.get("enCap"))
            if not captions:
                yield BadRow(file=file, row=number, reason=f"{clip_id}: {reading.EMPTY}")
                continue
            match = CUT.fullmatch(clip_id)
            video_id = match["video"] if match else clip_id
            is_whole = not files.has_id(clip_id) and match is not None and files.has_id(video_id)
            yield ClipRow(
                clip_id=clip_id,
                video_id=video_id,
                video_uri=files.of_id(video_id if is_whole else clip_id),
                captions=captions,
                split=source.split or "train",
                source="vatex",
                start_s=float(match["start"]) if match and is_whole else None,
                end_s=float(match["end"]) if match and is_whole else None,
                extras={"chCap": entry["chCap"]} if entry.get("chCap") else {},
            )
