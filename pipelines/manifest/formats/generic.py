"""Reads custom annotations: CSV, JSON, JSON lines or Parquet with one row per clip or caption.

The columns `video` (a path within the videos folder) and `caption` are required. `clip_id`,
`start_s`, `end_s` and `split` are optional, and all other columns are kept as extras. Other column
names are mapped with `--columns`, such as `--columns caption=text`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.common import storage
from pipelines.manifest.formats import reading
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

NEEDED = ("video", "caption")
KNOWN = (*NEEDED, "clip_id", "start_s", "end_s", "split")
HOW_TO_RENAME = "; map column names with --columns NAME=COLUMN"
MERGES = True


def read(source: AnnotationSource) -> Rows:
    """Yield a clip for each row; rows of the same clip are merged later.

    Raises:
        ManifestError: A required column is missing, or the file extension is unknown.
    """
    if unknown := sorted(source.columns.keys() - set(KNOWN)):
        raise ManifestError(f"columns = {', '.join(unknown)}: must be one of {', '.join(KNOWN)}")
    theirs = {name: source.columns.get(name, name) for name in KNOWN}
    for file in source.annotations:
        for number, row in _rows(file, tuple(theirs[name] for name in NEEDED)):
            yield _clip(row, number, file, source, theirs)


def _rows(file: str, needed: tuple[str, ...]) -> Iterator[tuple[int, Any]]:
    extension = file.rpartition(".")[2].lower()
    if extension == "csv":
        yield from reading.csv_rows(file, needed, HOW_TO_RENAME)
    elif extension in ("jsonl", "ndjson"):
        yield from _checked(file, reading.json_lines(file), needed)
    elif extension == "json":
        yield from _checked(file, reading.json_list(file), needed)
    elif extension == "parquet":
        yield from _parquet_rows(file, needed)
    else:
        raise ManifestError(
            f"{file}: unknown format; generic files must end in .csv, .jsonl, .json or .parquet"
        )


def _checked(
    file: str, rows: Iterator[tuple[int, Any]], needed: tuple[str, ...]
) -> Iterator[tuple[int, Any]]:
    """Yield the same rows after checking that the first one has the required columns."""
    for place, (number, row) in enumerate(rows):
        if place == 0 and isinstance(row, dict):
            reading.require_columns(file, needed, list(row), HOW_TO_RENAME)
        yield number, row


def _parquet_rows(file: str, needed: tuple[str, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    with reading.open_binary(file) as binary:
        try:
            parquet = pq.ParquetFile(binary)
        except pa.ArrowInvalid as error:
            raise ManifestError(f"{file} is not a Parquet file: {error}") from error
        reading.require_columns(file, needed, parquet.schema_arrow.names, HOW_TO_RENAME)
        number = 0
        for batch in parquet.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _clip(
    row: Any, number: int, file: str, source: AnnotationSource, theirs: dict[str, str]
) -> ClipRow | BadRow:
    if reason := reading.require(row, (theirs["video"],)):
        return BadRow(file=file, row=number, reason=reason)
    values = {name: row.get(column) for name, column in theirs.items()}
    video = str(values["video"])
    if "://" not in video and ".." in video.split("/"):
        return BadRow(file=file, row=number, reason=f"{video} is outside the videos folder")
    captions = reading.caption_list(values["caption"])
    if not captions:
        return BadRow(file=file, row=number, reason=f"{video}: {reading.EMPTY}")
    try:
        start, end = (_seconds(values[name]) for name in ("start_s", "end_s"))
    except (TypeError, ValueError):
        return BadRow(
            file=file, row=number, reason=f"{video}: start_s or end_s is not a valid time"
        )
    if start is not None and end is not None and end <= start:
        reason = f"{video}: the end ({end} s) is not after the start ({start} s)"
        return BadRow(file=file, row=number, reason=reason)
    span = "" if start is None and end is None else f"#{start or 0.0}-{'' if end is None else end}"
    return ClipRow(
        clip_id=str(values["clip_id"] or video + span),
        video_id=video,
        video_uri=video if "://" in video else storage.join(source.videos, video),
        captions=captions,
        split=str(values["split"] or source.split or "train"),
        source="generic",
        start_s=start,
        end_s=end,
        extras={name: value for name, value in row.items() if name not in theirs.values()},
    )


def _seconds(value: Any) -> float | None:
    if value in (None, ""):
        return None
    seconds = float(value)
    if not 0 <= seconds < math.inf:
        raise ValueError(value)
    return seconds
