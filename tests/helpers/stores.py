"""Clip stores written without an ingest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.artifacts.clip_store import (
    CATALOGUE,
    CLIP_SCHEMA,
    recorded_sampling,
    shard_uri,
    shard_writer,
)
from pipelines.common import storage
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig


def write_store(
    folder: Path, sampling: SamplingConfig, shards: Sequence[Sequence[Mapping[str, Any]]]
) -> str:
    """Write a finished store of gray clips.

    Args:
        folder: The store.
        sampling: Its settings.
        shards: For each shard, its rows with at least clip_id and captions.
    """
    shape = (sampling.num_frames, sampling.size, sampling.size, 3)
    frames = frame_codec.encode_frames(np.full(shape, 90, np.uint8), sampling.codec, 95)
    (folder / "shards").mkdir(parents=True)
    records = []
    for number, rows in enumerate(shards):
        place = shard_uri(str(folder), number)
        with shard_writer(place) as writer:
            for row in rows:
                given = {"video_id": row["clip_id"], "video_uri": f"/{row['clip_id']}.mp4"}
                filled = {**dict.fromkeys(CLIP_SCHEMA.names), **given, "frames": frames, **row}
                writer.write_table(pa.Table.from_pylist([filled], schema=CLIP_SCHEMA))
        record = {"shard": number, "clips": len(rows), "quarantined": 0}
        records.append({**record, "sha256": storage.digest(place), "bytes": 1})
    with_caption = sum(bool(row["captions"]) for rows in shards for row in rows)
    catalogue = {
        "clips": sum(len(rows) for rows in shards),
        "quarantined": 0,
        "sampling": recorded_sampling(sampling),
        "shards": records,
        "digest": "".join(record["sha256"][:8] for record in records),
        "histograms": {"captions_per_clip": [with_caption]},
    }
    storage.write_json(storage.join(str(folder), CATALOGUE), catalogue)
    return str(folder)
