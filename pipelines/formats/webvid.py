"""WebVid CSV files, results_{2M,10M}_{train,val}.csv: columns are found by name, in any order.

A video lies at <videos>/<page_dir>/<videoid>.mp4. Ids and folders are text: they keep leading
zeros.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import BinaryIO, cast

from pipelines import storage
from pipelines.formats.rows import BadRow, ClipRow
from stgt.captions import clean_caption
from stgt.errors import ManifestError

COLUMNS = ("videoid", "page_dir", "name")
EXTRA_COLUMNS = ("contentUrl", "duration", "page_idx")
MAX_CAPTION_CHARACTERS = 350
"""Longer captions are cut, as the published WebVid reader does."""


def read(annotations: str, videos: str, split: str) -> Iterator[ClipRow | BadRow]:
    """Yield a clip or a rejected row for each line of a WebVid CSV.

    Raises:
        ManifestError: the file is missing, is not UTF-8, or lacks a column.
    """
    try:
        fs, path = storage.filesystem(annotations)
        with fs.open(path, "rb") as binary:
            text = io.TextIOWrapper(cast(BinaryIO, binary), encoding="utf-8-sig", newline="")
            reader = csv.DictReader(text)
            found = reader.fieldnames or []
            if missing := [name for name in COLUMNS if name not in found]:
                raise ManifestError(
                    f"{annotations} lacks the columns {', '.join(missing)} "
                    f"(found: {', '.join(found) or 'nothing'}); a WebVid CSV has "
                    f"{', '.join(COLUMNS)} in its first line"
                )
            for number, row in enumerate(reader, start=1):
                yield _clip(row, number, annotations, videos, split)
    except csv.Error as error:
        raise ManifestError(
            f"{annotations} line {reader.line_num}: {error}; a quote may be unclosed"
        ) from error
    except FileNotFoundError as error:
        raise ManifestError(f"annotations {annotations} are not there; check the path") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{annotations} is not UTF-8 text: {error}") from error


def _clip(
    row: dict[str, str], number: int, annotations: str, videos: str, split: str
) -> ClipRow | BadRow:
    values = {name: (row.get(name) or "").strip() for name in COLUMNS}
    for name in ("videoid", "page_dir"):
        if not values[name] or values[name].lower() == "nan":
            return BadRow(file=annotations, row=number, reason=f"{name} is empty")
    if any("\n" in (value or "") for name, value in row.items() if name in COLUMNS):
        reason = "a field spans several lines: a quote may be unclosed"
        return BadRow(file=annotations, row=number, reason=reason)
    if ".." in values["page_dir"].split("/") or "/" in values["videoid"]:
        reason = "videoid or page_dir leads out of the videos' folder"
        return BadRow(file=annotations, row=number, reason=reason)
    caption = values["name"][:MAX_CAPTION_CHARACTERS]
    if caption.lower() == "nan" or not clean_caption(caption):
        return BadRow(file=annotations, row=number, reason="caption is empty after cleaning")
    video_id = values["videoid"]
    extras = {name: row[name] for name in EXTRA_COLUMNS if row.get(name)}
    return ClipRow(
        clip_id=video_id,
        video_id=video_id,
        video_uri=storage.join(videos, values["page_dir"], f"{video_id}.mp4"),
        captions=[caption],
        split=split,
        source="webvid",
        extras=json.dumps(extras, sort_keys=True),
    )
