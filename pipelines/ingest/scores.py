"""Similarities of the clips of a store and their captions, beside its shards.

Layout, in the store's folder, only with filters.min_similarity:
    similarity/00003.parquet  similarities of the clips of shard 3, in its order; .r1 as for the
                              shard

Columns: clip_id, and similarity, which is null until it has been computed and for clips without
captions. The metadata names the checksum of the shard, so similarities of another version of the
shard are never used.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from pipelines.artifacts.caption_similarity import OF_SHARD, scores_uri
from pipelines.common import storage

SCHEMA = pa.schema([("clip_id", pa.string()), ("similarity", pa.float32())])


def write_scores(
    store: str, shard: int, revision: int, scores: Mapping[str, float | None], sha256: str
) -> None:
    """Write the similarities of a shard with this checksum, by clip id."""
    table = pa.table(
        {"clip_id": list(scores), "similarity": list(scores.values())}, schema=SCHEMA
    ).replace_schema_metadata({OF_SHARD: sha256})
    storage.write_table(scores_uri(store, shard, revision), table)


def read_scores(store: str, shard: int, revision: int, sha256: str) -> dict[str, float]:
    """Read the known similarities of a shard, by clip id."""
    uri = scores_uri(store, shard, revision)
    if not storage.exists(uri):
        return {}
    table = storage.read_table(uri)
    if (table.schema.metadata or {}).get(OF_SHARD.encode(), b"").decode() != sha256:
        return {}
    ids, values = (table[name].to_pylist() for name in SCHEMA.names)
    return {name: value for name, value in zip(ids, values, strict=True) if value is not None}
