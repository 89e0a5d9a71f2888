"""The clip manifest: one row per clip, in Parquet, sorted by a hash of the clip's id.

Because rows are sorted by hash, a shard is a contiguous range of rows and a random sample of the
clips at once, for any number of shards, and duplicates lie side by side.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.config import ManifestConfig
from pipelines.formats import webvid
from pipelines.formats.rows import BadRow, ClipRow
from stgt.errors import ManifestError

logger = logging.getLogger(__name__)

ROWS_PER_GROUP = 1024

SCHEMA = pa.schema(
    [
        pa.field("clip_hash", pa.uint64(), nullable=False),
        pa.field("clip_id", pa.string(), nullable=False),
        pa.field("video_id", pa.string(), nullable=False),
        pa.field("video_uri", pa.string(), nullable=False),
        pa.field("start_s", pa.float64()),
        pa.field("end_s", pa.float64()),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("extras", pa.string(), nullable=False),
    ]
)

READERS = {"webvid": webvid.read}


class ManifestSummary(TypedDict):
    """What `run_manifest` found."""

    manifest: str
    clips: int
    rejected: int
    rejected_rows: str | None


def clip_hash(clip_id: str) -> int:
    """A 64-bit hash of a clip's id, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "big")


@dataclass
class _Sorted:
    """Rows of a reader, divided into clips and rejects."""

    clips: list[ClipRow]
    rejected: list[BadRow]


def _divide(rows: Iterable[ClipRow | BadRow]) -> _Sorted:
    result = _Sorted([], [])
    for row in rows:
        (result.rejected if isinstance(row, BadRow) else result.clips).append(row)  # type: ignore[arg-type]
    return result


def _table(clips: list[ClipRow]) -> pa.Table:
    columns = {
        "clip_hash": pa.array([clip_hash(clip.clip_id) for clip in clips], pa.uint64()),
        **{
            name: pa.array([getattr(clip, name) for clip in clips], SCHEMA.field(name).type)
            for name in SCHEMA.names
            if name != "clip_hash"
        },
    }
    table = pa.table(columns, schema=SCHEMA)
    return table.sort_by([("clip_hash", "ascending"), ("clip_id", "ascending")])


def _duplicates(table: pa.Table) -> list[str]:
    ids = table["clip_id"]
    if len(ids) < 2:
        return []
    same = pc.call_function("equal", [ids.slice(1), ids.slice(0, len(ids) - 1)])
    return ids.slice(1).filter(same).unique().to_pylist()


def run_manifest(config: ManifestConfig) -> ManifestSummary:
    """Read annotations in a data set's format; write the manifest beside the rejected rows.

    Raises:
        ManifestError: the annotations cannot be read, a local folder of videos is missing or holds
            none of them, two clips have the same id, or no row is usable.
    """
    videos = storage.resolve(config.videos)
    local = storage.is_local(videos)
    if local and not (storage.is_folder(videos) and storage.list_names(videos)):
        raise ManifestError(
            f"videos folder {videos} is missing or empty; give the folder that holds the videos"
        )
    rows: Iterator[ClipRow | BadRow] = READERS[config.format](
        storage.resolve(config.annotations), videos, config.split
    )
    divided = _divide(rows)
    if not divided.clips:
        first = f"; the first: {divided.rejected[0]}" if divided.rejected else ""
        raise ManifestError(
            f"{config.annotations}: no usable row, {len(divided.rejected)} rejected{first}"
        )
    if local and not any(storage.exists(clip.video_uri) for clip in divided.clips):
        raise ManifestError(
            f"videos folder {videos} holds none of the {len(divided.clips)} videos that "
            f"{config.annotations} names (the first: {divided.clips[0].video_uri}); "
            "give the folder that holds the videos"
        )
    table = _table(divided.clips)
    if duplicates := _duplicates(table):
        raise ManifestError(
            f"{config.annotations}: {len(duplicates)} clip ids occur more than once "
            f"({', '.join(duplicates[:5])}); remove the repeated rows"
        )
    output = storage.resolve(config.output)
    rejected_uri = None
    if divided.rejected:
        rejected_uri = f"{output.removesuffix('.parquet')}.rejected.parquet"
        fields = ("file", "row", "reason")
        storage.write_table(
            rejected_uri,
            pa.table({f: [getattr(bad, f) for bad in divided.rejected] for f in fields}),
        )
        logger.warning(
            "%d of %d rows rejected, listed in %s",
            len(divided.rejected),
            len(divided.rejected) + len(divided.clips),
            rejected_uri,
        )
    storage.write_table(output, table, ROWS_PER_GROUP)
    return ManifestSummary(
        manifest=output,
        clips=len(table),
        rejected=len(divided.rejected),
        rejected_rows=rejected_uri,
    )


def check_manifest(uri: str) -> pa.Table:
    """The hashes of a manifest's clips, once its columns and order are found to be right.

    Returns:
        A table with the column `clip_hash` alone.

    Raises:
        ManifestError: it is missing, empty, lacks a column, or is not sorted by clip_hash.
    """
    if not storage.exists(uri):
        raise ManifestError(f"manifest {uri} is not there; make it with python -m jobs.manifest")
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise ManifestError(f"manifest {uri} is not a Parquet file: {error}") from error
        if missing := [name for name in SCHEMA.names if name not in parquet.schema_arrow.names]:
            raise ManifestError(
                f"manifest {uri} lacks the columns {', '.join(missing)}; "
                "make it with python -m jobs.manifest"
            )
        hashes = parquet.read(columns=["clip_hash"])
    if len(hashes) == 0:
        raise ManifestError(f"manifest {uri} holds no clips")
    column = hashes["clip_hash"]
    hashed = column.to_numpy()
    if (hashed[1:] < hashed[:-1]).any():
        raise ManifestError(
            f"manifest {uri} is not sorted by clip_hash; make it with python -m jobs.manifest"
        )
    return hashes


def read_rows(uri: str, start: int, stop: int) -> list[dict]:
    """Rows start to stop of a manifest, reading only the row groups they lie in."""
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        groups, first_row, position = [], None, 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            if position < stop and position + rows > start:
                groups.append(group)
                first_row = position if first_row is None else first_row
            position += rows
        if first_row is None:
            return []
        table = parquet.read_row_groups(groups)
    return table.slice(start - first_row, stop - start).to_pylist()
