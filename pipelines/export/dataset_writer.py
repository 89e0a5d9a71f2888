"""The workers that write the clips of a store as a data set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.clip_store import ClipStore, shard_uri
from pipelines.common import ray_errors, storage
from pipelines.export.dataset_form import (
    DATASET_SCHEMA,
    ExportedShard,
    RowsDigest,
    exported_uri,
    read_rows,
    row_groups,
    split_of,
    to_dataset_row,
)
from stgt.errors import ClipStoreError

Row = dict[str, Any]


def _leaf_names() -> list[str]:
    names = []
    for field in DATASET_SCHEMA:
        if field.name == "frames":
            names += [f"frames.list.element.{part}" for part in ("bytes", "path")]
        elif pa.types.is_list(field.type):
            names.append(f"{field.name}.list.element")
        else:
            names.append(field.name)
    return names


_PARQUET: dict[str, Any] = {
    # Pictures do not compress, and all of them are different.
    "compression": {
        name: "none" if name == "frames.list.element.bytes" else "zstd" for name in _leaf_names()
    },
    "use_dictionary": ["split", "source", "codec", "decoder"],
    "write_statistics": ["clip_id"],
}


class ShardExporter:
    """Writes the clips of shards to files of a data set (a Ray Data actor).

    Reads:
        part: Number of the shard.
    Adds:
        done: Number of its clips.
    """

    def __init__(self, store: str, dataset: str, files_of: Sequence[Mapping[str, str]]) -> None:
        """Open a store.

        Args:
            store: The store.
            dataset: Folder of the data set.
            files_of: For each shard, the path of the file for each value of the column `split`.
        """
        self._store = ClipStore(store)
        self._dataset = dataset
        self._files_of = files_of

    @ray_errors.errors_as_rows
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Write the shards of a batch."""
        clips = [self._write(int(shard)) for shard in batch["part"]]
        return {"part": np.array(batch["part"]), "done": np.array(clips)}

    def _write(self, shard: int) -> int:
        files = self._files_of[shard]
        digest, order = RowsDigest(), []
        place_of = {split: place for place, split in enumerate(files)}
        size_bytes = 0
        listed = self._store.catalogue["shards"][shard]
        source = shard_uri(self._store.uri, shard, int(listed.get("revision", 0)))
        with storage.as_local(source) as local:
            if storage.digest(str(local)) != listed["sha256"]:
                raise ClipStoreError(
                    f"{source} has changed since it was written; run jobs.ingest with --verify"
                )
            for row in read_rows(local):
                digest.add(row)
                order.append(place_of[split_of(row)])
            # A shard is read once more for each split, which bounds the memory; nearly all stores
            # have one.
            for split, file in files.items():
                mine = (row for row in read_rows(local) if split_of(row) == split)
                size_bytes += self._write_file(storage.join(self._dataset, file), mine)
        record = ExportedShard(
            shard=shard,
            files=list(files.values()),
            file_of_clip=order if len(files) > 1 else None,
            clips=len(order),
            bytes=size_bytes,
            rows_sha256=digest.hexdigest(),
        )
        storage.write_json(exported_uri(self._dataset, shard), record)
        return len(order)

    def _write_file(self, uri: str, rows: Iterator[Row]) -> int:
        made = (to_dataset_row(row, self._store.sampling) for row in rows)
        with storage.writing(uri) as path:
            with pq.ParquetWriter(path, DATASET_SCHEMA, **_PARQUET) as writer:
                for group in row_groups(made):
                    writer.write_table(pa.Table.from_pylist(group, schema=DATASET_SCHEMA))
            return path.stat().st_size
