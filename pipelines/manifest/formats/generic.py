"""Reads custom annotations: tables with one row per clip or caption.

The columns `video` and `caption` are required. `video` is a path within the videos folder, with or
without its extension, an absolute path, a URI, the bytes of the video, or a struct of `bytes` and
`path`. `clip_id`, `start_s`, `end_s` and `split` are optional, and all other columns are kept as
extras. Other column names are mapped with `--columns`, such as `--columns caption=text`.

Videos whose bytes are in the table are written to a folder beside the manifest, under the SHA-256
of their contents, so that equal videos are stored once and every later stage reads ordinary files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.manifest.formats import reading, tables, values
from pipelines.manifest.formats.files import AmbiguousVideo, VideoFinder, is_outside
from pipelines.manifest.formats.media import BytesWriter
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
    theirs = column_names(source)
    files, media = source.finder(), BytesWriter(source.media)
    for file in source.annotations:
        needed = tuple(theirs[name] for name in NEEDED)
        for number, row in tables.rows(file, needed, HOW_TO_RENAME):
            reason = reading.require(row, (theirs["video"],))
            if reason is None:
                try:
                    yield _clip(row, source, theirs, files, media)
                    continue
                except ValueError as error:
                    reason = str(error)
            yield BadRow(file=file, row=number, reason=reason)


def _clip(
    row: dict[str, Any],
    source: AnnotationSource,
    theirs: dict[str, str],
    files: VideoFinder,
    media: BytesWriter,
) -> ClipRow:
    """Convert a row to a clip.

    Raises:
        ValueError: The row cannot be used.
    """
    extras = {name: value for name, value in row.items() if name not in theirs.values()}
    data, path = _bytes_and_path(row.get(theirs["video"]))
    video = path if data is None else media.name_of(data, path)
    if video is None:
        raise ValueError(f"{theirs['video']} is missing or empty")
    if data is None and is_outside(video):
        raise ValueError(f"{video} is outside the videos folder")
    details = read_details(row, theirs, video)
    uri: str | AmbiguousVideo
    if data is None:
        uri = files.of_path(video)
    else:
        uri = media.write(data, video)
        extras |= {} if path is None else {"path": path}
    return ClipRow(
        clip_id=details.clip_id if details.clip_id is not None else video + details.span,
        video_id=video,
        video_uri=uri,
        captions=details.captions,
        split=details.split or source.split or "train",
        source="generic",
        start_s=details.start_s,
        end_s=details.end_s,
        extras=extras,
    )


@dataclass(frozen=True, kw_only=True)
class RowDetails:
    """Values of a row of a table, without its video."""

    captions: list[str]
    clip_id: str | None
    split: str | None
    start_s: float | None
    end_s: float | None

    @property
    def span(self) -> str:
        """What distinguishes ids of several clips of a video: empty for the whole video."""
        if self.start_s is None and self.end_s is None:
            return ""
        return f"#{self.start_s or 0.0}-{'' if self.end_s is None else self.end_s}"


def read_details(
    row: Mapping[str, Any], theirs: Mapping[str, str], video: str, *, needs_caption: bool = True
) -> RowDetails:
    """Read captions, ids and times from a row.

    Args:
        row: The row.
        theirs: Names of the columns in the file, by their names here.
        video: Name of the video, for messages.
        needs_caption: Whether a row without a caption is an error.

    Raises:
        ValueError: The row cannot be used.
    """
    found = {name: row.get(column) for name, column in theirs.items()}
    captions = reading.caption_list(found["caption"])
    if needs_caption and not captions:
        raise ValueError(f"{video}: {reading.EMPTY}")
    try:
        start, end = (values.seconds(found[name], theirs[name]) for name in ("start_s", "end_s"))
        clip_id = values.identifier(found["clip_id"], theirs["clip_id"])
        split = values.identifier(found["split"], theirs["split"])
    except ValueError as error:
        raise ValueError(f"{video}: {error}") from error
    if start is not None and end is not None and end <= start:
        raise ValueError(f"{video}: the end ({end} s) is not after the start ({start} s)")
    return RowDetails(captions=captions, clip_id=clip_id, split=split, start_s=start, end_s=end)


def column_names(source: AnnotationSource) -> dict[str, str]:
    """Return the names of the known columns in the files, by their names here.

    Raises:
        ManifestError: A name that is to be mapped is unknown.
    """
    if unknown := sorted(source.columns.keys() - set(KNOWN)):
        raise ManifestError(f"columns = {', '.join(unknown)}: must be one of {', '.join(KNOWN)}")
    return {name: source.columns.get(name, name) for name in KNOWN}


def _bytes_and_path(value: Any) -> tuple[bytes | None, str | None]:
    """Return the bytes of a video, if the table contains them, and its path, if it has one."""
    if isinstance(value, bytes):
        return value or None, None
    if isinstance(value, dict) and "bytes" in value and value.keys() <= {"bytes", "path"}:
        data = value["bytes"]
        if data is not None and not isinstance(data, bytes):
            raise ValueError("the bytes of the video are not binary data")
        return data or None, values.identifier(value.get("path"), "path")
    return None, values.identifier(value, "video")
