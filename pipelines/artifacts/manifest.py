"""The clip manifest: one row per clip, in Parquet, sorted by a hash of the clip's id.

Because rows are sorted by hash, any contiguous range of rows is a random sample of the clips. A
shard is therefore a range of rows. Duplicate ids are adjacent.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.common import storage
from pipelines.common.config import without_credentials
from stgt.errors import ManifestError

ROWS_PER_GROUP = 1024

BUFFER_ROWS = 100_000
GROUPS_AT_ONCE = 64
"""Number of row groups that are held in memory while scattered rows are read."""

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


def clip_hash(clip_id: str) -> int:
    """Return a 64-bit hash of a clip's id, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "big")


def whole_videos_table(
    video_uris: Mapping[str, str], captions: Mapping[str, str], source: str
) -> pa.Table:
    """Build a manifest whose clips are whole videos.

    Args:
        video_uris: maps a clip id to the URI of its video.
        captions: maps a clip id to its caption.
        source: value of the column `source`.
    """
    ids = sorted(video_uris, key=clip_hash)
    return pa.table(
        {
            "clip_hash": np.array([clip_hash(clip_id) for clip_id in ids], dtype=np.uint64),
            "clip_id": ids,
            "video_id": ids,
            "video_uri": [video_uris[clip_id] for clip_id in ids],
            "start_s": pa.nulls(len(ids), pa.float64()),
            "end_s": pa.nulls(len(ids), pa.float64()),
            "captions": [[captions[clip_id]] for clip_id in ids],
            "split": ["train"] * len(ids),
            "source": [source] * len(ids),
            "extras": ["{}"] * len(ids),
        },
        schema=SCHEMA,
    )


WEB_SCHEMES = ("https://", "http://")
URL_KEY_CHARACTERS = 32


def is_web_address(uri: str) -> bool:
    """Return whether a URI is an address on the web, such as those in a list of URLs."""
    return uri.lower().startswith(WEB_SCHEMES)


def url_key(url: str) -> str:
    """Return 32 hexadecimal digits that stand for a URL: the beginning of its SHA-256."""
    return storage.digest_of(url.encode())[:URL_KEY_CHARACTERS]


MADE_BY = "create it with python -m jobs.manifest"


@storage.patient
def check_manifest(uri: str) -> int:
    """Check the columns, order and ids of a manifest and return its number of clips.

    Raises:
        ManifestError: The manifest is missing or empty, lacks a column, is not sorted by clip_hash,
            or contains a clip more than once.
    """
    if not storage.exists(uri):
        raise ManifestError(f"manifest {uri} does not exist; {MADE_BY}")
    if storage.is_local(uri) and Path(storage.resolve(uri)).is_dir():
        raise ManifestError(f"manifest {uri} is a folder; give a Parquet file; {MADE_BY}")
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        try:
            parquet = pq.ParquetFile(file)
        except pa.ArrowInvalid as error:
            raise ManifestError(f"manifest {uri} is not a Parquet file: {error}") from error
        if missing := [name for name in SCHEMA.names if name not in parquet.schema_arrow.names]:
            raise ManifestError(f"manifest {uri} lacks the columns {', '.join(missing)}; {MADE_BY}")
        before = np.empty(0, dtype=np.uint64)
        equal = False
        for batch in parquet.iter_batches(BUFFER_ROWS, columns=["clip_hash"]):
            hashes = np.concatenate([before, batch["clip_hash"].to_numpy()])
            if (hashes[1:] < hashes[:-1]).any():
                raise ManifestError(f"manifest {uri} is not sorted by clip_hash; {MADE_BY}")
            equal = equal or bool((hashes[1:] == hashes[:-1]).any())
            before = hashes[-1:]
        if equal:
            _refuse_duplicates(uri, parquet)
        count = parquet.metadata.num_rows
        if count == 0:
            raise ManifestError(f"manifest {uri} contains no clips")
        return count


@storage.patient
def refuse_web_addresses(uri: str) -> None:
    """Check that no video of a manifest is an address on the web.

    Only row groups whose statistics leave it open are read.

    Raises:
        ManifestError: A video must be fetched first.
    """
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            if not _may_have_web_addresses(parquet.metadata.row_group(group)):
                continue
            for video in parquet.read_row_group(group, ["video_uri"])["video_uri"].to_pylist():
                if is_web_address(video):
                    raise ManifestError(
                        f"manifest {uri} contains URLs, such as {without_credentials(video)}; "
                        f"fetch the videos with python -m jobs.fetch --annotations {uri}, and use "
                        "the manifest that it writes"
                    )


def _may_have_web_addresses(group: pq.RowGroupMetaData) -> bool:
    columns = (group.column(number) for number in range(group.num_columns))
    found = next(one for one in columns if one.path_in_schema == "video_uri").statistics
    if found is None or not found.has_min_max:
        return True
    # Schemes may be in capitals, which come before small letters.
    return str(found.min) < "httpt" and str(found.max) >= "HTTP"


def _refuse_duplicates(uri: str, parquet: pq.ParquetFile) -> None:
    """Raise a ManifestError if two adjacent rows have the same clip id."""
    before = ""
    for batch in parquet.iter_batches(BUFFER_ROWS, columns=["clip_id"]):
        for clip_id in batch["clip_id"].to_pylist():
            if clip_id == before:
                raise ManifestError(
                    f"manifest {uri} contains clip {clip_id} more than once; {MADE_BY}, which "
                    "rejects or merges repeated clips"
                )
            before = clip_id


class ManifestRows:
    """Reads ranges of rows of a manifest; the footer is read only once."""

    def __init__(self, uri: str) -> None:
        """Open a manifest."""
        self._uri = storage.resolve(uri)
        self._metadata = _footer(self._uri)
        rows = [
            self._metadata.row_group(group).num_rows
            for group in range(self._metadata.num_row_groups)
        ]
        self._ends = np.cumsum(rows, dtype=np.int64)
        self._caption_counts: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return int(self._metadata.num_rows)

    @functools.cached_property
    def has_one_caption_each(self) -> bool:
        """Whether the footer shows that every row has exactly one caption."""
        for group in range(self._metadata.num_row_groups):
            column = _caption_column(self._metadata.row_group(group))
            found = column.statistics
            if found is None or not found.has_null_count or found.null_count:
                return False
            if column.num_values != self._metadata.row_group(group).num_rows:
                return False
        return True

    def caption_counts(self) -> npt.NDArray[np.int64]:
        """Return [rows] int64, the number of captions of each row; read once."""
        if self._caption_counts is None:
            lengths = [np.empty(0, dtype=np.int64)]
            for group in range(self._metadata.num_row_groups):
                table = _read_groups(self._uri, self._metadata, [group], ["captions"])
                found = pc.call_function("list_value_length", [table["captions"]])
                lengths.append(found.to_numpy().astype(np.int64))
            self._caption_counts = np.concatenate(lengths)
        return self._caption_counts

    def digest(self) -> str:
        """Return a short hash of the footer, which has sizes and statistics of all columns."""
        told = self._metadata.to_dict()
        return hashlib.sha256(json.dumps(told, default=repr).encode()).hexdigest()[:12]

    def hashes(self) -> npt.NDArray[np.uint64]:
        """Return [rows] uint64, the column `clip_hash`."""
        hashes = np.empty(len(self), dtype=np.uint64)
        for start in range(0, len(self), BUFFER_ROWS):  # a table of all rows would take as much
            part = self.table(start, start + BUFFER_ROWS, ["clip_hash"])
            hashes[start : start + len(part)] = part["clip_hash"].to_numpy()
        return hashes

    def read(self, start: int, stop: int, columns: list[str] | None = None) -> list[dict]:
        """Read rows start (inclusive) to stop (exclusive), from only their row groups."""
        return self.table(start, stop, columns).to_pylist()

    def table(self, start: int, stop: int, columns: list[str] | None = None) -> pa.Table:
        """Read rows start (inclusive) to stop (exclusive) as a table."""
        stop = min(stop, len(self))
        if start >= stop:
            empty = SCHEMA.empty_table()
            return empty if columns is None else empty.select(columns)
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        table = _read_groups(self._uri, self._metadata, list(range(first, last + 1)), columns)
        begin = int(self._ends[first - 1]) if first else 0
        return table.slice(start - begin, stop - start)

    def take(self, rows: npt.NDArray[np.int64], columns: list[str] | None = None) -> list[dict]:
        """Read some rows, given in ascending order, from only their row groups."""
        found: list[dict] = []
        group_of = np.searchsorted(self._ends, rows, side="right")
        groups = np.unique(group_of)
        sizes = np.diff(self._ends, prepend=0)
        for start in range(0, len(groups), GROUPS_AT_ONCE):
            part = groups[start : start + GROUPS_AT_ONCE]
            inside = (group_of >= part[0]) & (group_of <= part[-1])
            place = np.searchsorted(part, group_of[inside])
            # Row in the table = row in its group, after the groups that are read before it.
            before = np.cumsum(sizes[part]) - self._ends[part]
            table = _read_groups(self._uri, self._metadata, part.tolist(), columns)
            found += table.take(rows[inside] + before[place]).to_pylist()
        return found


def _caption_column(group: pq.RowGroupMetaData) -> pq.ColumnChunkMetaData:
    columns = (group.column(number) for number in range(group.num_columns))
    return next(column for column in columns if column.path_in_schema.startswith("captions."))


@storage.patient
def _footer(uri: str) -> pq.FileMetaData:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        return pq.ParquetFile(file).metadata


@storage.patient
def _read_groups(
    uri: str, metadata: pq.FileMetaData, groups: list[int], columns: list[str] | None
) -> pa.Table:
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        return pq.ParquetFile(file, metadata=metadata).read_row_groups(groups, columns=columns)
