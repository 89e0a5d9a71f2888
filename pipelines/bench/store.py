"""Speed of reading clips from a store (JPEG, 8 frames at 224), against decoding their videos.

Also measures data workers of a node that share a shard through the cache, against each of them
reading the shard separately.
"""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from pipelines.artifacts.clip_store import CLIP_SCHEMA, shard_uri, shard_writer
from pipelines.bench.decode import FRAMES, SECONDS, SIZE, ours, request
from pipelines.bench.harness import Row, faster, median_seconds
from pipelines.bench.videos import make_videos
from pipelines.common import storage
from pipelines.feed.shard_cache import ShardCache
from pipelines.video import frame_codec
from pipelines.video.child import Decoded, decode_file
from pipelines.video.frame_codec import encode_frames

logger = logging.getLogger(__name__)

GOP = 250
VIDEOS = 4
CLIPS = 256
WORKERS, BLOCK = 8, 16


def measure(device: str, repeats: int) -> list[Row]:
    """Measure seconds per clip."""
    with TemporaryDirectory() as folder:
        logger.info("writing %d videos and a shard of %d clips", VIDEOS, CLIPS)
        videos = make_videos(Path(folder) / "videos", VIDEOS, SECONDS, GOP)
        store = storage.join(folder, "store")
        size = _write_shard(store, videos)
        logger.info("%.0f KB per clip", size / CLIPS / 1000)

        def read() -> None:
            table = storage.read_table(shard_uri(store, 0), ["clip_id", "frames"])
            for coded in table["frames"]:
                frames = frame_codec.decode_frames(coded.as_py(), "jpeg", SIZE)
                assert frames.shape == (FRAMES, SIZE, SIZE, 3)

        def decode() -> None:
            for video in videos:
                ours(video)

        seconds = median_seconds({"store": read, "videos": decode}, "cpu", repeats)
        shared = median_seconds(
            {
                "shared": lambda: _dealt_out(store, shared=True),
                "each": lambda: _dealt_out(store, shared=False),
            },
            "cpu",
            repeats,
        )
    per_clip = seconds["store"].per(CLIPS), seconds["videos"].per(VIDEOS)
    per_dealt = shared["shared"].per(CLIPS), shared["each"].per(CLIPS)
    return [
        faster("store", *per_clip),
        faster(f"store/{WORKERS} workers", *per_dealt),
    ]


def _dealt_out(store: str, shared: bool) -> None:
    """Read the coded frames of a shard as several data workers would, in blocks and in turns."""

    def load() -> pa.Table:
        return storage.read_table(shard_uri(store, 0), ["clip_id", "frames"])

    order = np.random.default_rng(0).permutation(CLIPS)
    with TemporaryDirectory() as folder:
        caches = [ShardCache(folder) for _ in range(WORKERS)]
        tables: dict[int, pa.Table] = {}
        for number, block in enumerate(np.split(order, CLIPS // BLOCK)):
            worker = number % WORKERS
            if worker not in tables:
                tables[worker] = caches[worker].table("0", load) if shared else load()
            for row in block.tolist():
                assert len(tables[worker].slice(row, 1).to_pylist()[0]["frames"]) == FRAMES


def _write_shard(store: str, videos: list[Path]) -> int:
    rows = []
    decoded = []
    for video in videos:
        found = decode_file(request(video))
        assert isinstance(found, Decoded), found
        decoded.append(encode_frames(found.frames, "jpeg", 95))
    for number in range(CLIPS):
        row = dict.fromkeys(CLIP_SCHEMA.names)
        rows.append({**row, "clip_id": str(number), "frames": decoded[number % len(decoded)]})
    with storage.writing(shard_uri(store, 0)) as path:
        with shard_writer(path) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA))
        return path.stat().st_size
