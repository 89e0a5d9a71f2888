"""The rows of a manifest in the order of their videos, sorted on disk with little memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.manifest import BUFFER_ROWS, clip_hash

BUCKET_BITS = 6
VIDEO_HASH = "video_hash"
ROWS_AT_ONCE = 10_000
"""Number of rows that are Python objects at the same time."""


class RowsByVideo:
    """Rows of a manifest, partitioned by the first bits of a hash of their video's URI."""

    def __init__(self, manifest: Path, folder: Path) -> None:
        """Partition the rows.

        Args:
            manifest: The manifest.
            folder: An empty folder for the partitions.
        """
        self._paths = [folder / f"{bucket:02d}.parquet" for bucket in range(2**BUCKET_BITS)]
        writers: dict[int, pq.ParquetWriter] = {}
        with pq.ParquetFile(manifest) as file:
            for batch in file.iter_batches(BUFFER_ROWS):
                rows = pa.Table.from_batches([batch])
                hashes = np.array(
                    [clip_hash(uri) for uri in rows["video_uri"].to_pylist()], dtype=np.uint64
                )
                rows = rows.append_column(VIDEO_HASH, pa.array(hashes))
                bucket_of = hashes >> np.uint64(64 - BUCKET_BITS)
                for bucket in np.unique(bucket_of).tolist():
                    part = rows.take(np.flatnonzero(bucket_of == bucket))
                    if bucket not in writers:
                        writers[bucket] = pq.ParquetWriter(self._paths[bucket], part.schema)
                    writers[bucket].write_table(part)
        for writer in writers.values():
            writer.close()

    def _tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        order = [(VIDEO_HASH, "ascending"), ("video_uri", "ascending")]
        if columns is None:
            order += [("start_s", "ascending"), ("clip_hash", "ascending")]
        for path in self._paths:
            if path.exists():
                yield pq.read_table(path, columns=columns).sort_by(order)

    def write_videos(self, path: Path) -> int:
        """Write a table of the videos, each once and in their order; return their number."""
        schema = pa.schema([pa.field("video_uri", pa.string(), nullable=False)])
        count = 0
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in self._tables(["video_uri", VIDEO_HASH]):
                uris = list(dict.fromkeys(table["video_uri"].to_pylist()))
                count += len(uris)
                writer.write_table(pa.table({"video_uri": uris}, schema=schema), BUFFER_ROWS)
        return count

    def rows(self) -> Iterator[dict[str, Any]]:
        """Iterate over the rows in the order of their videos, and by start within a video."""
        for table in self._tables():
            for batch in table.drop_columns([VIDEO_HASH]).to_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
