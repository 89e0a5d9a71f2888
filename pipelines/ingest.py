"""Manifest -> Ray Data -> clip store and quarantine; restarted, it goes on with what is left.

A shard is the unit of work: a contiguous range of the manifest (hence a random sample of the
clips), decoded by one worker in order and written whole, so the same input gives the same bytes
whichever worker made it and however often the run was interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy
from ray.util.queue import Queue

from pipelines import faults, storage
from pipelines.clips import (
    CATALOGUE,
    CLIP_SCHEMA,
    QUARANTINE_SCHEMA,
    STORE,
    encode_frames,
    shard_name,
)
from pipelines.config import IngestConfig, fingerprint, to_dict
from pipelines.decode import ClipDecoder
from pipelines.manifest import check_manifest, read_rows
from pipelines.progress import Progress, ProgressChannel
from stgt.errors import ClipStoreError, VideoDecodeError

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 2.0
READ_BYTES = 8 * 1024 * 1024


class IngestSummary(TypedDict):
    """What `run_ingest` made."""

    store: str
    clips: int
    quarantined: int
    reasons: dict[str, int]
    seconds: float


class ShardRecord(TypedDict):
    """Facts of a finished shard."""

    shard: int
    clips: int
    quarantined: int
    reasons: dict[str, int]
    bytes: int
    sha256: str


def store_uri(config: IngestConfig) -> str:
    """The folder of the store that a config makes: its name is a hash of the sampling config."""
    return storage.join(storage.resolve(config.output), fingerprint(to_dict(config.sampling)))


def _record_uri(store: str, shard: int) -> str:
    return storage.join(store, "shards", f"{shard:05d}.json")


class ShardIngester:
    """Decodes and writes one shard after another (a Ray Data actor).

    Reads:
        shard, start, stop: the shard and its rows of the manifest.
    Adds:
        record: the shard's `ShardRecord`, without its reasons.
    """

    def __init__(self, config: IngestConfig, progress: Queue) -> None:
        self._config = config
        self._store = store_uri(config)
        self._progress = progress
        self._decoder = ClipDecoder(
            config.sampling, config.deadline_s, config.max_pixels, config.memory_limit_bytes
        )

    @faults.contained
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the shards of a batch."""
        for shard, start, stop in zip(batch["shard"], batch["start"], batch["stop"], strict=True):
            self._make_shard(int(shard), int(start), int(stop))
        return {"shard": np.array(batch["shard"])}

    def _make_shard(self, shard: int, start: int, stop: int) -> None:
        clips: list[dict[str, Any]] = []
        bad: list[dict[str, Any]] = []
        reported = {"time": time.monotonic(), "clips": 0, "bad": 0}
        for row in read_rows(storage.resolve(self._config.manifest), start, stop):
            try:
                clips.append(self._decode(row))
            except VideoDecodeError as error:
                bad.append(_quarantine_row(row, error))
            if time.monotonic() - reported["time"] > REPORT_EVERY_S:
                self._report(reported, len(clips), len(bad))
        self._report(reported, len(clips), len(bad))
        name = shard_name(shard)
        storage.write_table(
            storage.join(self._store, "quarantine", name),
            pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA),
        )
        data = storage.write_table(
            storage.join(self._store, "shards", name),
            pa.Table.from_pylist(clips, schema=CLIP_SCHEMA),
        )
        record = ShardRecord(
            shard=shard,
            clips=len(clips),
            quarantined=len(bad),
            reasons=dict(Counter(row["reason"] for row in bad)),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        storage.write_json(_record_uri(self._store, shard), record)

    def _decode(self, row: dict[str, Any]) -> dict[str, Any]:
        decoded = self._decoder.decode(
            row["clip_id"], row["video_uri"], row["start_s"], row["end_s"]
        )
        facts = decoded.facts
        return {
            "clip_id": row["clip_id"],
            "video_id": row["video_id"],
            "captions": row["captions"],
            "frames": encode_frames(decoded.frames, self._config.sampling),
            "frame_indices": decoded.frame_indices,
            "width": facts.width,
            "height": facts.height,
            "fps": facts.fps,
            "duration_s": facts.duration_s,
            "num_source_frames": facts.num_source_frames,
            "codec": facts.codec,
            "decoder": facts.decoder,
            "salvaged": facts.salvaged,
        }

    def _report(self, reported: dict[str, Any], clips: int, bad: int) -> None:
        done = clips + bad - reported["clips"] - reported["bad"]
        self._progress.put({"advance": done, "bad": bad - reported["bad"]})
        reported.update(time=time.monotonic(), clips=clips, bad=bad)


def _quarantine_row(row: dict[str, Any], error: VideoDecodeError) -> dict[str, Any]:
    return {
        "clip_id": row["clip_id"],
        "video_uri": row["video_uri"],
        "reason": error.reason,
        "message": error.message,
        "attempts": 1,
    }


class _IngestProgress(Progress):
    """Adds up bad clips of all workers and shows their share."""

    def __init__(self, total: int, done: int, bad: int) -> None:
        super().__init__("ingest", total, "clips", done)
        self._bad = bad

    def reach(self, done: int, figures: Any = None) -> None:
        self._bad += int((figures or {}).get("bad", 0))
        super().reach(done, {"bad": f"{100 * self._bad / max(1, done):.1f} %"})


def _manifest_digest(uri: str) -> str:
    digest = hashlib.sha256()
    fs, path = storage.filesystem(uri)
    with fs.open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)  # type: ignore[arg-type]
    return digest.hexdigest()


def _claim_store(config: IngestConfig, store: str, manifest: str, num_shards: int) -> None:
    """Write what the store is made of, or check that it is the same as before."""
    identity = {
        "sampling": to_dict(config.sampling),
        "manifest_sha256": _manifest_digest(manifest),
        "shards": num_shards,
    }
    uri = storage.join(store, STORE)
    if storage.exists(uri):
        found = storage.read_json(uri)
        differing = [name for name in identity if found.get(name) != identity[name]]
        if differing:
            raise ClipStoreError(
                f"{store} holds a store of another {', '.join(differing)}; "
                "choose another output folder, or delete this one"
            )
    else:
        storage.write_json(uri, identity)


def run_ingest(config: IngestConfig) -> IngestSummary:
    """Make the clip store of a manifest, or finish one that was begun.

    Raises:
        ManifestError: the manifest cannot be used.
        STGTError: another process is at work on the store.
        ClipStoreError: the folder holds another store, no clip is usable, or the share of bad clips
            is above the limit (finished shards are kept).
    """
    started = time.monotonic()
    manifest, store = storage.resolve(config.manifest), store_uri(config)
    total = len(check_manifest(manifest))
    num_shards = max(1, round(total / config.clips_per_shard))
    with storage.lock(store):
        catalogue = _finish_store(config, store, manifest, total, num_shards)
    return _summary(store, catalogue, started)


def _finish_store(
    config: IngestConfig, store: str, manifest: str, total: int, num_shards: int
) -> dict[str, Any]:
    """Make what is missing of a store, and give its catalogue."""
    _claim_store(config, store, manifest, num_shards)
    if storage.exists(storage.join(store, CATALOGUE)):
        return storage.read_json(storage.join(store, CATALOGUE))
    edges = np.linspace(0, total, num_shards + 1).astype(np.int64)
    records = _finished_shards(store)
    pending = [shard for shard in range(num_shards) if shard not in records]
    if records:
        logger.info("ingest goes on: %d of %d shards are finished", len(records), num_shards)
    if pending:
        _make_shards(config, total, edges, pending, records)
        records = _finished_shards(store)
    catalogue = _catalogue(config, store, num_shards, records)
    storage.write_json(storage.join(store, CATALOGUE), catalogue)
    return catalogue


def _finished_shards(store: str) -> dict[int, ShardRecord]:
    names = storage.list_names(storage.join(store, "shards"))
    records = [
        storage.read_json(storage.join(store, "shards", name))
        for name in names
        if name.endswith(".json")
    ]
    return {record["shard"]: record for record in records}


def _make_shards(
    config: IngestConfig,
    total: int,
    edges: np.ndarray,
    pending: list[int],
    finished: dict[int, ShardRecord],
) -> None:
    done = sum(record["clips"] + record["quarantined"] for record in finished.values())
    bad = sum(record["quarantined"] for record in finished.values())
    workers = config.num_workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    with ProgressChannel(_IngestProgress(total, done, bad)) as channel:
        shards = ray.data.from_items(
            [{"shard": s, "start": int(edges[s]), "stop": int(edges[s + 1])} for s in pending],
            override_num_blocks=len(pending),
        )
        made = shards.map_batches(
            ShardIngester,
            fn_constructor_args=(config, channel.queue),
            batch_size=1,
            compute=ActorPoolStrategy(size=min(workers, len(pending))),
            num_cpus=1,
        )
        for _ in faults.rows(made):
            pass  # shards are written by the workers; rows only say that they are


def _catalogue(
    config: IngestConfig, store: str, num_shards: int, records: dict[int, ShardRecord]
) -> dict[str, Any]:
    reasons: Counter[str] = Counter()
    for record in records.values():
        reasons.update(record["reasons"])
    clips = sum(record["clips"] for record in records.values())
    quarantined = sum(record["quarantined"] for record in records.values())
    said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    where = storage.join(store, "quarantine")
    if clips == 0:
        raise ClipStoreError(
            f"none of {quarantined} clips can be used ({said}); see {where} and check that the "
            "videos are where the manifest says"
        )
    fraction = quarantined / (clips + quarantined)
    if fraction > config.max_bad_fraction:
        raise ClipStoreError(
            f"{quarantined} of {clips + quarantined} clips are bad ({said}), more than "
            f"max_bad_fraction = {config.max_bad_fraction:g} allows; see {where}, mend the videos "
            "and delete the store, or raise the limit and run again"
        )
    return {
        "sampling": to_dict(config.sampling),
        "clips": clips,
        "quarantined": quarantined,
        "reasons": dict(reasons),
        "shards": [records[shard] for shard in range(num_shards)],
    }


def _summary(store: str, catalogue: dict[str, Any], started: float) -> IngestSummary:
    return IngestSummary(
        store=store,
        clips=catalogue["clips"],
        quarantined=catalogue["quarantined"],
        reasons=catalogue["reasons"],
        seconds=round(time.monotonic() - started, 1),
    )
