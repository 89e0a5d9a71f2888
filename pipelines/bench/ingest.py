"""Rate of an ingest on Ray, against a plain loop in one process with the same decoder.

Rates are steady-state rates: starting Ray and its workers does not count.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from pipelines.artifacts.manifest import clip_hash, whole_videos_table
from pipelines.bench.decode import SECONDS
from pipelines.bench.harness import Measured, Row, higher
from pipelines.bench.videos import make_videos
from pipelines.common import storage
from pipelines.common.config import TrackingConfig
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.run import run_ingest
from pipelines.video.child import Decoded, DecodeRequest, decode_file

logger = logging.getLogger(__name__)

GOP = 250
VIDEOS = 4
CLIPS = 384
LOOP_CLIPS = 48


def measure(repeats: int, connect: Callable[[], None]) -> list[Row]:
    """Measure clips per second of an ingest, and of the loop times the number of cores."""
    connect()
    cores = os.cpu_count() or 1
    with TemporaryDirectory() as folder:
        logger.info("writing %d videos", VIDEOS)
        videos = make_videos(Path(folder) / "videos", VIDEOS, SECONDS, GOP)
        manifest = storage.join(folder, "manifest.parquet")
        storage.write_table(manifest, manifest_of(videos, CLIPS))
        config = IngestConfig(
            manifest=manifest,
            output=folder,
            num_workers=cores,
            clips_per_shard=24,
            tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db"),
        )
        ingested, looped = [], []
        for repeat in range(repeats):
            for name in ("ingest", "loop") if repeat % 2 == 0 else ("loop", "ingest"):
                if name == "loop":
                    looped.append(cores * _loop(videos, config))
                else:
                    output = storage.join(folder, f"run{repeat}")
                    rate = run_ingest(replace(config, output=output))["clips_per_s"]
                    assert rate is not None
                    ingested.append(rate)
            logger.info(
                "run %d of %d: ingest %.2f clips/s, %d loops would reach %.2f",
                repeat + 1,
                repeats,
                ingested[-1],
                cores,
                looped[-1],
            )
    return [higher("ingest", "clips/s", Measured(ingested), Measured(looped))]


def manifest_of(videos: list[Path], clips: int) -> pa.Table:
    """Return a manifest with the given number of clips. Each clip is the whole of a video."""
    ids = sorted((f"clip-{number:05d}" for number in range(clips)), key=clip_hash)
    uris = {clip_id: str(videos[number % len(videos)]) for number, clip_id in enumerate(ids)}
    return whole_videos_table(uris, dict.fromkeys(ids, "a caption"), "bench")


def _loop(videos: list[Path], config: IngestConfig) -> float:
    """Return clips per second of a single process that only decodes."""
    sampling = config.sampling
    started = time.perf_counter()
    for number in range(LOOP_CLIPS):
        decoded = decode_file(
            DecodeRequest(
                path=str(videos[number % len(videos)]),
                num_frames=sampling.num_frames,
                frame_choice=sampling.frame_choice,
                size=sampling.size,
                resize=sampling.resize,
                decoder=sampling.decoder,
                max_pixels=config.max_pixels,
                max_bytes=config.max_bytes,
            )
        )
        assert isinstance(decoded, Decoded), decoded
    return LOOP_CLIPS / (time.perf_counter() - started)
