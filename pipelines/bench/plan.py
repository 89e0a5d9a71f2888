"""Cost of the driver in an ingest of ten million clips, against rows held as Python objects.

All but two shards are finished already, so the ingest plans, finds the finished shards, makes the
missing two, and writes the catalogue and the report. Then the manifest gets rows for two further
shards, so the ingest compares ten million rows with it. Each side runs in a separate process to
measure its memory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.clip_store import (
    CLIP_SCHEMA,
    ShardRecord,
    record_uri,
    shard_uri,
    shard_writer,
)
from pipelines.artifacts.manifest import ROWS_PER_GROUP, SCHEMA
from pipelines.bench.harness import Row, faster, in_child, smaller
from pipelines.bench.videos import make_video
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.ingest import histograms
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.plan import store_uri
from pipelines.ingest.run import run_ingest
from pipelines.video import frame_codec
from pipelines.video.config import SamplingConfig

logger = logging.getLogger(__name__)

ROWS = 10_000_000
ROWS_WRITTEN = 500_000
CLIPS_PER_SHARD = 1024
UNFINISHED = 2
ADDED = 2 * CLIPS_PER_SHARD


def measure(repeats: int, connect: Callable[[], None]) -> list[Row]:
    """Measure time and memory of the driver.

    Each side runs only once, because the differences are far larger than noise. Needs
    approximately 4 GB of disk space, and enough memory for the baseline.
    """
    with TemporaryDirectory() as folder:
        config, grown = _prepare(Path(folder))
        ours = in_child(_ingest, (config, ROWS), connect)
        growth = in_child(_ingest, (grown, ROWS + ADDED), connect)
        theirs = in_child(_rows_as_objects, (config,))
    logger.info(
        "ours %.1f s, %.0f MB; growth %.1f s, %.0f MB; rows as objects %.1f s, %.0f MB",
        *(value for seconds, size in (ours, growth, theirs) for value in (seconds, size / 1e6)),
    )
    return [
        faster("plan", ours[0], theirs[0]),
        smaller("plan/limit", "s", ours[0]),
        smaller("plan/memory", "bytes", ours[1], theirs[1]),
        smaller("plan/memory limit", "bytes", ours[1]),
        smaller("plan/growth limit", "s", growth[0]),
        smaller("plan/growth memory limit", "bytes", growth[1]),
    ]


def _prepare(folder: Path) -> tuple[IngestConfig, IngestConfig]:
    """Write two manifests, and a store of the first one in which two shards are missing.

    Returns:
        The configs of the ingest of each manifest.
    """
    video = make_video(folder / "video.mp4", seconds=0.5, gop=250, seed=0)
    manifest, grown = folder / "manifest.parquet", folder / "grown.parquet"
    write_manifest(manifest, ROWS, str(video))
    write_manifest(grown, ROWS, str(video), ADDED)
    config = IngestConfig(
        manifest=str(manifest),
        output=str(folder / "clips"),
        sampling=SamplingConfig(num_frames=1, size=16),
        clips_per_shard=CLIPS_PER_SHARD,
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
    )
    _fill_store(config)
    return config, replace(config, manifest=str(grown))


def write_manifest(path: Path, rows: int, video: str, added: int = 0) -> None:
    """Write a manifest of generated rows, whose clips all have the same video.

    Args:
        path: The file to write.
        rows: Number of rows. The first ones are the same with any number of added rows.
        video: URI of the video.
        added: Number of further rows at the end.
    """
    count = rows + added
    hashes = np.random.default_rng(0).integers(0, 2**63, count, dtype=np.uint64)
    hashes[:rows].sort()
    hashes[rows:] = hashes[rows - 1]  # so that captions, which count rows, stay the same
    hashes += np.arange(count, dtype=np.uint64)  # makes them unique
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for start in range(0, count, ROWS_WRITTEN):
            writer.write_table(_rows(hashes, start, video), ROWS_PER_GROUP)
    logger.info("manifest of %s rows", f"{count:,}")


def _rows(hashes: np.ndarray, start: int, video: str) -> pa.Table:
    part = hashes[start : start + ROWS_WRITTEN]
    ids = pa.array(part).cast(pa.string())
    count = len(part)
    captions = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1, dtype=np.int32)),
        pa.array([f"a caption of middling length, number {start + i}" for i in range(count)]),
    )
    return pa.table(
        {
            "clip_hash": part,
            "clip_id": ids,
            "video_id": ids,
            "video_uri": pa.array([video] * count),
            "start_s": pa.nulls(count, pa.float64()),
            "end_s": pa.nulls(count, pa.float64()),
            "captions": captions,
            "split": pa.array(["train"] * count),
            "source": pa.array(["bench"] * count),
            "extras": pa.array(["{}"] * count),
        },
        schema=SCHEMA,
    )


def _fill_store(config: IngestConfig) -> None:
    """Write records of finished shards, whose files are all hard links to the same file."""
    store = store_uri(config)
    num_shards = round(ROWS / CLIPS_PER_SHARD)
    sizes = np.diff(np.linspace(0, ROWS, num_shards + 1).astype(np.int64))
    frame = frame_codec.encode_frames(np.zeros((1, 16, 16, 3), dtype=np.uint8), "jpeg", 95)
    row: dict[str, Any] = {
        **dict.fromkeys(CLIP_SCHEMA.names),
        "captions": ["a caption"],
        "frames": frame,
        "width": 596,
        "height": 336,
        "fps": 24.0,
        "duration_s": 20.0,
        "salvaged": False,
    }
    rows = [{**row, "clip_id": str(number)} for number in range(int(sizes.max()))]
    first = Path(shard_uri(store, 0))
    first.parent.mkdir(parents=True)
    with shard_writer(first) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=CLIP_SCHEMA))
    for shard, size in enumerate(sizes[:-UNFINISHED].tolist()):
        if shard:
            os.link(first, shard_uri(store, shard))
        record = ShardRecord(
            shard=shard,
            revision=0,
            clips=size,
            quarantined=0,
            salvaged=0,
            reasons={},
            bytes=first.stat().st_size,
            sha256="0" * 64,
            quarantine_sha256="0" * 64,
            histograms=histograms.count({name: [1.0] * size for name in histograms.EDGES}),
            captions=[size],
        )
        storage.write_json(record_uri(store, shard), record)


def _ingest(config: IngestConfig, clips: int) -> None:
    summary = run_ingest(config)
    assert summary["clips"] == clips, summary


def _rows_as_objects(config: IngestConfig) -> None:
    """Build a list of all rows as Python objects, without any further work."""
    columns = ["clip_id", "video_uri", "captions"]
    rows = pq.read_table(config.manifest, columns=columns).to_pylist()
    shards = [rows[i : i + CLIPS_PER_SHARD] for i in range(0, len(rows), CLIPS_PER_SHARD)]
    assert len(shards) == -(-ROWS // CLIPS_PER_SHARD)
