"""The workers that make the shards of a clip store from the files of a data set."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.clip_store import (
    ROWS_PER_GROUP,
    ShardRecord,
    read_sampling,
    record_uri,
    shard_uri,
    shard_writer,
)
from pipelines.common import ray_errors, storage
from pipelines.export.dataset_form import (
    DATA_FILE,
    DATASET_SCHEMA,
    STORE_PART,
    ExportedShard,
    RowsDigest,
    read_rows,
    to_store_row,
)
from pipelines.export.records import read_catalogue, read_shard
from pipelines.export.store_files import BESIDE_SHARDS
from stgt.errors import ClipStoreError

Row = dict[str, Any]


class ShardRestorer:
    """Makes shards from the files of a data set (a Ray Data actor).

    Reads:
        part: Number of the shard.
    Adds:
        done: Number of its clips.
    """

    def __init__(self, dataset: str, store: str) -> None:
        self._dataset = dataset
        self._part = storage.join(dataset, STORE_PART)
        self._store = store
        self._catalogue = read_catalogue(self._part)
        self._sampling = read_sampling(self._catalogue["sampling"])

    @ray_errors.errors_as_rows
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the shards of a batch."""
        clips = [self._make(int(shard)) for shard in batch["part"]]
        return {"part": np.array(batch["part"]), "done": np.array(clips)}

    def _make(self, shard: int) -> int:
        exported, record = read_shard(self._dataset, shard, self._catalogue)
        digest, count = RowsDigest(), 0
        place = shard_uri(self._store, shard, record["revision"])
        with storage.writing(place) as path:
            with shard_writer(path) as writer:
                for group in self._groups(exported):
                    writer.write_table(pa.Table.from_pylist(group, schema=writer.schema))
                    count += len(group)
                    for row in group:
                        digest.add(row)
                    if count > record["clips"]:
                        break  # the files may hold any number of rows
            # Nothing appears at its place before this.
            if digest.hexdigest() != exported["rows_sha256"] or count != record["clips"]:
                raise ClipStoreError(
                    f"{self._dataset} has changed since it was exported: the clips of "
                    f"{', '.join(exported['files'])} are not those of shard {shard}; export the "
                    "store again, or fetch these files again"
                )
            size_bytes, sha256 = path.stat().st_size, storage.digest(str(path))
        self._write_beside(shard, record, sha256)
        changed: ShardRecord = {**record, "bytes": size_bytes, "sha256": sha256}
        storage.write_json(record_uri(self._store, shard), changed)
        return count

    def _write_beside(self, shard: int, record: ShardRecord, sha256: str) -> None:
        """Copy the hashes and similarities of a shard, and name the checksum of its new file."""
        for place, of_shard in BESIDE_SHARDS:
            source = place(self._part, shard, record["revision"])
            if not storage.exists(source):
                continue
            target = place(self._store, shard, record["revision"])
            if sha256 == record["sha256"]:
                storage.write_bytes(target, storage.read_bytes(source))
                continue
            try:
                table = storage.read_table(source)
            except pa.ArrowException as error:
                raise ClipStoreError(f"{source} is damaged ({error}); fetch it again") from error
            named = (table.schema.metadata or {}).get(of_shard.encode(), b"").decode()
            if named == record["sha256"]:
                table = table.replace_schema_metadata({of_shard: sha256})
            # What belongs to another version of the shard stays unused, as in the store.
            storage.write_table(target, table)

    def _groups(self, exported: ExportedShard) -> Iterator[list[Row]]:
        """Read the clips of a shard, in its order, in the row groups of a store."""
        with ExitStack() as stack:
            sources = [
                self._rows(stack.enter_context(storage.as_local(self._uri(file))), file)
                for file in exported["files"]
            ]
            order = exported["file_of_clip"]
            rows = (
                iter(sources[0] if sources else ())
                if order is None
                else (next(sources[place], {}) for place in order)
            )
            group: deque[Row] = deque()
            for row in rows:
                if not row:
                    break  # the checksum shows that clips are missing
                group.append(row)
                if len(group) == ROWS_PER_GROUP:
                    yield list(group)
                    group.clear()
            if group:
                yield list(group)

    def _uri(self, file: str) -> str:
        if DATA_FILE.fullmatch(file) is None:
            raise ClipStoreError(f"{self._dataset} lists {file!r}, which is no file of a data set")
        return storage.join(self._dataset, file)

    def _rows(self, path: Any, file: str) -> Iterator[Row]:
        """Read the rows of a data file as rows of a store."""
        uri = storage.join(self._dataset, file)
        if not path.exists():
            raise ClipStoreError(f"{uri} is missing; fetch it again")
        try:
            schema = pq.read_schema(path)
        except pa.ArrowInvalid as error:
            raise ClipStoreError(f"{uri} is damaged ({error}); fetch it again") from error
        if missing := [name for name in DATASET_SCHEMA.names if name not in schema.names]:
            raise ClipStoreError(
                f"{uri} lacks the columns {', '.join(missing)}; give a data set that jobs.export "
                "wrote from a clip store"
            )
        for field in DATASET_SCHEMA:
            if (kind := schema.field(field.name).type) != field.type:
                raise ClipStoreError(
                    f"{uri}: the column {field.name} has the type {kind} instead of {field.type}; "
                    "give a data set that jobs.export wrote from a clip store"
                )
        try:
            for row in read_rows(path):
                yield to_store_row(row, self._sampling)
        except (ValueError, pa.ArrowException, OSError) as error:
            raise ClipStoreError(f"{uri} is damaged ({error}); fetch it again") from error
