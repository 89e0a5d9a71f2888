"""Reads the folders that video2dataset writes with `--output_format files`.

The annotations are the output folder, the Parquet files beside the shard folders, such as
00000.parquet, or the JSON files in the shard folders. The videos are 00000/000000000.mp4 and so on,
below the videos folder. A row whose status is not `success` was not downloaded. The caption is that
of the row, or the text file beside the video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipelines.common import storage
from pipelines.manifest.formats import json_files, opening, reading, tables
from pipelines.manifest.formats.files import AmbiguousVideo, VideoFinder
from pipelines.manifest.formats.rows import AnnotationSource, BadRow, ClipRow, Rows
from stgt.errors import ManifestError

SUCCESS = "success"
MERGES = False


def read(source: AnnotationSource) -> Rows:
    """Yield a clip or a rejected row for each row of each shard.

    Raises:
        ManifestError: A file is neither Parquet nor JSON, or it is a tar of the webdataset output.
    """
    files = source.finder(".mp4")
    for file in _files(source.annotations):
        is_json = opening.extension(file) == "json"
        shard = storage.name_of(file.rpartition("/")[0] if is_json else file).partition(".")[0]
        for number, row in _rows(file):
            reason = reading.require(row, ("key",), ("key",))
            if reason is None:
                try:
                    yield _clip(row, shard, source, files)
                    continue
                except ValueError as error:
                    reason = f"{row['key']}: {error}"
            yield BadRow(file=file, row=number, reason=reason)


def _files(annotations: Sequence[str]) -> Iterator[str]:
    """Yield the files with the rows: the given ones, and those in a given local folder."""
    for uri in annotations:
        if storage.is_remote(uri) or not Path(uri).is_dir():
            yield uri
            continue
        names = storage.list_below(uri, 0) or []
        found = [name for name in names if name.endswith(".parquet")]
        if not found:
            found = [name for name in names if "/" in name and name.endswith(".json")]
        if not found:
            raise ManifestError(
                f"{uri} contains neither the Parquet files nor the JSON files that video2dataset "
                "writes; give its output folder"
            )
        yield from (storage.join(uri, name) for name in found)


def _rows(file: str) -> Iterator[tuple[int, Any]]:
    extension = opening.extension(file)
    if extension == "parquet":
        yield from tables.parquet_rows(file, ("key",))
    elif extension == "json":
        yield 1, json_files.json_value(file)
    elif extension == "tar":
        raise ManifestError(
            f"{file} is an output of the kind webdataset; read it with --format webdataset, which "
            "takes the tar files"
        )
    else:
        raise ManifestError(f"{file}: give the Parquet or JSON files that video2dataset wrote")


def _clip(row: dict[str, Any], shard: str, source: AnnotationSource, files: VideoFinder) -> ClipRow:
    key = str(row["key"])
    captions, extras = described(row)
    uri = files.of_id(key, folders=[shard])
    captions = captions or _caption_beside(uri)
    if not captions:
        raise ValueError(reading.EMPTY)
    return ClipRow(
        clip_id=key,
        video_id=key,
        video_uri=uri,
        captions=captions,
        split=source.split or "train",
        source="video2dataset",
        extras=extras,
    )


def described(row: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the captions and the extras of a downloaded video.

    Args:
        row: the JSON object that video2dataset writes beside it, or a row of its tables.

    Raises:
        ValueError: The video was not downloaded; the message is that of the downloader.
    """
    status = row.get("status")
    if status is not None and status != SUCCESS:
        raise ValueError(f"{status}: {row.get('error_message') or 'no message'}")
    left_out = ("key", "caption", "status", "error_message")
    extras = {name: value for name, value in row.items() if name not in left_out}
    return (
        reading.caption_list(row.get("caption")),
        {name: value for name, value in extras.items() if value is not None},
    )


def _caption_beside(uri: str | AmbiguousVideo) -> list[str]:
    """Return the caption in the text file beside a video, if there is one."""
    if isinstance(uri, AmbiguousVideo):
        return []
    text = f"{uri.rpartition('.')[0]}.txt"
    if not storage.exists(text):
        return []
    if storage.is_local(text) and (fault := reading.fault_of_local(Path(text))) is not None:
        raise ValueError(f"{storage.name_of(text)}: {fault}")
    return reading.caption_list(storage.read_bytes(text).decode("utf-8", "replace"))
