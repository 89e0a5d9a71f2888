"""Perceptual hashes of the frames of a clip store, beside its shards.

Layout, in the store's folder:
    hashes/00003.parquet      hashes of the clips of shard 3, in its order; .r1 as for the shard

Columns: clip_id, video_id, hashes (one uint64 for each stored frame). The metadata names the
checksum of the shard, so hashes of another version of the shard are never used. The shards
themselves are as in stores of earlier versions, which have no hashes until `add_hashes` is called.

An ingest hashes the frames that it decodes, and `add_hashes` those that are stored. JPEG changes
the frames a little, so the two may differ in a few bits, which a search has to allow for anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.artifacts.clip_store import ClipStore, shard_name
from pipelines.common import storage
from pipelines.video import frame_codec, frame_hash
from pipelines.video.config import SamplingConfig

FOLDER = "hashes"
NO_HASH = frame_hash.NO_HASH
"""Hash of a frame that shows nothing."""
OF_SHARD = "shard_sha256"
SCHEMA = pa.schema(
    [
        ("clip_id", pa.string()),
        ("video_id", pa.string()),
        ("hashes", pa.list_(pa.uint64())),
    ]
)


def hashes_uri(store: str, index: int, revision: int = 0) -> str:
    """Return the URI of the hashes of a shard."""
    return storage.join(store, FOLDER, shard_name(index, revision))


def hashes_of(clips: Iterable[Mapping[str, Any]], sampling: SamplingConfig) -> list[dict[str, Any]]:
    """Return a row of hashes for each clip.

    Args:
        clips: Rows of a shard with at least clip_id, video_id and frames, and with `hashes` if they
            are known already.
        sampling: Settings of the store.

    Raises:
        ValueError: A stored frame is damaged.
    """
    rows = []
    for clip in clips:
        hashes = clip.get("hashes")
        if hashes is None:
            frames = frame_codec.decode_frames(clip["frames"], sampling.codec, sampling.size)
            hashes = frame_hash.hash_frames(frames).tolist()
        rows.append({"clip_id": clip["clip_id"], "video_id": clip["video_id"], "hashes": hashes})
    return rows


def write_hashes(
    store: str, index: int, revision: int, rows: list[dict[str, Any]], sha256: str
) -> None:
    """Write the hashes of a shard with this checksum, completely or not at all."""
    table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata({OF_SHARD: sha256})
    storage.write_table(hashes_uri(store, index, revision), table)


def read_written(store: str, index: int, revision: int, sha256: str) -> pa.Table | None:
    """Read the hashes of a shard; None if there are none, or they are of another version of it."""
    uri = hashes_uri(store, index, revision)
    if not storage.exists(uri):
        return None
    table = storage.read_table(uri)
    of_shard = (table.schema.metadata or {}).get(OF_SHARD.encode(), b"").decode()
    return table if of_shard == sha256 else None


def read_hashes(store: ClipStore, index: int) -> pa.Table | None:
    """Read the hashes of a shard of a finished store; None if it has none yet."""
    return read_written(store.uri, index, _revision(store, index), store.shard_key(index))


def _revision(store: ClipStore, index: int) -> int:
    return int(store.catalogue["shards"][index].get("revision", 0))


def shards_without_hashes(store: ClipStore) -> list[int]:
    """Return the shards of a store whose hashes have not been written yet."""
    return [index for index in range(len(store.shard_sizes)) if read_hashes(store, index) is None]


def add_hashes(store: ClipStore, index: int) -> int:
    """Hash the stored frames of a shard, and return its number of clips."""
    clips = store.read_shard(index, ["clip_id", "video_id", "frames"]).to_pylist()
    rows = hashes_of(clips, store.sampling)
    write_hashes(store.uri, index, _revision(store, index), rows, store.shard_key(index))
    return len(clips)


def same_clips(table: pa.Table, clip_ids: list[str], num_frames: np.ndarray) -> bool:
    """Return whether a table of hashes has a hash for each frame of these clips, in their order."""
    counts = np.array([len(hashes) for hashes in table["hashes"].to_pylist()], dtype=np.int64)
    return table["clip_id"].to_pylist() == clip_ids and bool(np.array_equal(counts, num_frames))
