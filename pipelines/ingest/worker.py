"""The decoding workers of an ingest, which make one shard after another.

A shard is decoded in the order of the manifest by one worker. The same input always gives the same
bytes, no matter which worker made the shard or how often the run was interrupted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from ray.exceptions import RayActorError
from ray.util.queue import Queue

from pipelines.artifacts.caption_similarity import scores_uri
from pipelines.artifacts.clip_store import (
    QUARANTINE_SCHEMA,
    ROWS_PER_GROUP,
    ShardRecord,
    more_than,
    record_uri,
    shard_name,
    shard_uri,
    shard_writer,
)
from pipelines.artifacts.frame_hashes import (
    hashes_of,
    hashes_uri,
    read_written,
    write_hashes,
)
from pipelines.artifacts.manifest import ManifestRows, clip_hash
from pipelines.common import ray_errors, storage
from pipelines.ingest import filters, histograms
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.scores import read_scores, write_scores
from pipelines.ingest.shard_rows import ShardRows
from pipelines.video.child import Decoded
from pipelines.video.decoder import ClipDecoder, ClipSpan
from pipelines.video.video_cache import VideoCache
from stgt.errors import STGTError, VideoDecodeError
from stgt.inputs.caption_text import clean_caption

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 2.0
MOST_UNREACHABLE = 10
"""Number of videos of consecutive clips that cannot be fetched after which the run ends.

By then the storage is assumed to be unavailable, not the individual files."""

MOST_SAID = 300
"""Number of characters of an unexpected error that are kept in the quarantine."""
SIMILARITY = "similarity"
"""Entry of a row: its similarity to its best caption, if it is known."""
DETAILS = ("video_id", "captions", "split", "source", "extras")
"""Columns of the manifest that may change without decoding a clip again."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ShardWork:
    """The work to do on each shard, the same for all workers."""

    config: IngestConfig
    store: str
    quarantine: str
    rows: ShardRows
    """Rows of the manifest that belong to each shard."""
    generation: int = 0
    """How many times the manifest of the store has changed."""
    again: tuple[frozenset[str], ...] = ()
    """For each generation, reasons for which clips in quarantine are decoded again."""
    listed: Mapping[int, int] = field(default_factory=dict)
    """Revision of each shard in the current catalogue. Readers use these files, so they stay."""
    retry: frozenset[str] | None = None
    """Reasons whose quarantined clips are retried, instead of making shards."""
    rejected: Mapping[int, Mapping[str, filters.Rejection]] | None = None
    """Clips to put into quarantine, by shard and clip id, instead of making shards."""


class _IsolatingDecoder(ClipDecoder):
    """A decoder in which an unexpected error, of whatever library, affects only its clip."""

    def decode(self, clip: ClipSpan) -> Decoded:
        """Decode the frames of a clip.

        Raises:
            VideoDecodeError: The clip failed.
            STGTError, MemoryError, OSError: The clip is not the problem, but for example the disk.
        """
        try:
            return super().decode(clip)
        except (STGTError, MemoryError):
            raise
        except Exception as error:
            if ray_errors.disk_is_full(error):
                raise
            message = f"{clip.video_uri}: {type(error).__name__}: {str(error)[:MOST_SAID]}"
            logger.warning("clip %s: %s", clip.clip_id, message, exc_info=True)
            raise VideoDecodeError(clip.clip_id, "unreachable", message) from error


class ShardIngester:
    """Makes or rewrites shards (a Ray Data actor).

    Reads:
        shard: Number of the shard.
    Adds:
        Nothing. A returned row means that the shard, its quarantine and its record are written.
    """

    def __init__(self, work: ShardWork, progress: Queue | None) -> None:
        self._work = work
        self._progress = progress
        self._manifest = ManifestRows(work.config.manifest)
        config = work.config
        self._decoder = _IsolatingDecoder(
            config.sampling,
            limits=config.limits,
            codec=config.sampling.codec,
            requirements=config.filters.requirements,
            hash_files=config.filters.unique_videos,
            cache=VideoCache(config.cache_dir, int(config.cache_gb * 1e9)),
        )
        self._send({"started": True})

    @ray_errors.errors_as_rows
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Process the shards of a batch."""
        for shard in batch["shard"].tolist():
            if self._work.retry is not None or self._work.rejected is not None:
                self._revise(shard)
            elif storage.exists(record_uri(self._work.store, shard)):
                self._update(shard)
            else:
                rows = self._told(shard, self._made(self._rows(shard)))
                self._write(shard, rows, revision=0, generation=self._work.generation)
        return {"shard": batch["shard"]}

    def _rows(self, shard: int) -> list[Row]:
        return self._work.rows.read(self._manifest, shard)

    def _made(self, rows: list[Row], attempts: Mapping[str, int] | None = None) -> Iterator[Row]:
        """Turn each row of the manifest into a row of the store or of the quarantine."""
        known = attempts or {}
        judged = [self._judged(row) for row in rows]
        outcomes = self._decoder.decode_all(
            _source(row, self._work.config.sampling.seed) for row, bad in judged if bad is None
        )
        unreachable: set[str] = set()
        for row, bad in judged:
            outcome = bad or next(outcomes)
            if _is_unreachable(outcome):
                unreachable.add(row["video_uri"])
            elif bad is None:
                unreachable.clear()
            if len(unreachable) == MOST_UNREACHABLE:
                assert isinstance(outcome, VideoDecodeError)
                raise STGTError(
                    f"{len(unreachable)} videos in a row could not be fetched (the last one: "
                    f"{outcome.message}); finished shards are kept"
                )
            if isinstance(outcome, VideoDecodeError):
                yield _quarantined(row, outcome, known.get(row["clip_id"], 0) + 1)
            else:
                yield _stored(row, outcome)

    def _judged(self, row: Row) -> tuple[Row, VideoDecodeError | None]:
        """Return a row with the captions that pass the filters, and an error if none does."""
        captions = filters.usable_captions(row["captions"], self._work.config.filters)
        if isinstance(captions, str):
            return row, VideoDecodeError(row["clip_id"], captions, filters.REASONS[captions])
        return {**row, "captions": captions}, None

    def _update(self, shard: int) -> None:
        """Rewrite a shard after the manifest has changed, with the stored frames."""
        record: ShardRecord = storage.read_json(record_uri(self._work.store, shard))
        generation = record.get("generation", 0)
        if generation >= self._work.generation:
            return  # already done: Ray repeats a batch if its worker was lost
        again = frozenset[str]().union(*self._work.again[generation + 1 :]) | filters.OF_CAPTIONS
        stored, bad = self._read(shard, record)
        judged = [self._judged(row) for row in self._rows(shard)]
        kept = {clip_id for clip_id, row in bad.items() if row["reason"] not in again}
        made = self._made(
            [
                row
                for row, rejected in judged
                if rejected is None and row["clip_id"] not in stored and row["clip_id"] not in kept
            ],
            {name: row["attempts"] for name, row in bad.items() if _is_undecodable(row)},
        )

        def rows() -> Iterator[Row]:
            for row, rejected in judged:
                clip_id = row["clip_id"]
                if rejected is not None:
                    yield _quarantined(row, rejected, attempts=1)
                elif clip_id in stored:
                    known = stored[clip_id]
                    if known["captions"] != row["captions"]:
                        known = {**known, SIMILARITY: None}
                    yield {**known, **{name: row[name] for name in DETAILS}}
                else:
                    yield bad[clip_id] if clip_id in kept else next(made)

        revision, generation = record["revision"] + 1, self._work.generation
        self._write(shard, self._told(shard, rows()), revision, generation)
        self._remove_unlisted(shard, record)

    def _read(self, shard: int, record: ShardRecord) -> tuple[dict[str, Row], dict[str, Row]]:
        """Read the stored and the quarantined clips of a shard, by id."""
        places = (
            shard_uri(self._work.store, shard, record["revision"]),
            self._quarantine_uri(shard, record["revision"]),
        )
        stored, bad = (
            {row["clip_id"]: row for row in storage.read_table(place).to_pylist()}
            for place in places
        )
        known = read_written(self._work.store, shard, record["revision"], record["sha256"])
        if known is not None:  # stores of earlier versions have no hashes
            for row in known.to_pylist():
                stored[row["clip_id"]]["hashes"] = row["hashes"]
        if self._work.config.filters.min_similarity is not None:
            scores = read_scores(self._work.store, shard, record["revision"], record["sha256"])
            for clip_id, value in scores.items():
                stored[clip_id][SIMILARITY] = value
        return stored, bad

    def _remove_unlisted(self, shard: int, record: ShardRecord) -> None:
        """Remove the files of a replaced revision, unless the catalogue lists them."""
        if self._work.listed.get(shard) != record["revision"]:
            storage.remove(shard_uri(self._work.store, shard, record["revision"]))
            storage.remove(self._quarantine_uri(shard, record["revision"]))
            storage.remove(hashes_uri(self._work.store, shard, record["revision"]))
            if self._work.config.filters.min_similarity is not None:
                storage.remove(scores_uri(self._work.store, shard, record["revision"]))

    def _revise(self, shard: int) -> None:
        """Rewrite a shard, with clips retried from quarantine or without rejected ones."""
        record: ShardRecord = storage.read_json(record_uri(self._work.store, shard))
        stored, bad = self._read(shard, record)
        rows = self._rows(shard)
        if self._work.retry is not None:
            again = [row for row in rows if _is_due(bad.get(row["clip_id"]), self._work.retry)]
            attempts = {row["clip_id"]: bad[row["clip_id"]]["attempts"] for row in again}
            made = self._made(again, attempts)
        else:
            assert self._work.rejected is not None
            why = self._work.rejected[shard]
            gone = why.keys() & stored.keys()
            made = (_rejected(row, why[row["clip_id"]]) for row in rows if row["clip_id"] in gone)
        changed = {row["clip_id"]: row for row in self._told(shard, made)}
        if not changed:
            return  # already done by a worker that was lost afterwards
        merged = {**stored, **bad, **changed}
        self._write(
            shard,
            (merged[row["clip_id"]] for row in rows),
            record["revision"] + 1,
            record.get("generation", 0),
        )
        self._remove_unlisted(shard, record)

    def _quarantine_uri(self, shard: int, revision: int) -> str:
        return storage.join(self._work.quarantine, shard_name(shard, revision))

    def _write(self, shard: int, rows: Iterator[Row], revision: int, generation: int) -> None:
        """Write clips, hashes, quarantine and, last, the record that marks them as finished."""
        bad: list[Row] = []
        hashes: list[Row] = []
        scores: dict[str, float | None] = {}
        seen = _Seen()
        place = shard_uri(self._work.store, shard, revision)
        with storage.writing(place) as path:
            with shard_writer(path) as writer:
                for group in _groups(_without(bad, rows)):
                    writer.write_table(pa.Table.from_pylist(group, schema=writer.schema))
                    seen.add(group)
                    hashes += hashes_of(group, self._work.config.sampling)
                    scores |= {row["clip_id"]: row.get(SIMILARITY) for row in group}
            size_bytes, sha256 = path.stat().st_size, storage.digest(str(path))
        write_hashes(self._work.store, shard, revision, hashes, sha256)
        if any(value is not None for value in scores.values()):
            write_scores(self._work.store, shard, revision, scores, sha256)
        quarantine = storage.write_table(
            self._quarantine_uri(shard, revision),
            pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA),
        )
        record = ShardRecord(
            shard=shard,
            revision=revision,
            clips=seen.clips,
            quarantined=len(bad),
            salvaged=seen.salvaged,
            reasons=dict(sorted(Counter(row["reason"] for row in bad).items())),
            bytes=size_bytes,
            sha256=sha256,
            quarantine_sha256=storage.digest_of(quarantine),
            histograms=histograms.count(seen.values),
            captions=more_than(np.array(seen.values["captions_per_clip"], dtype=np.int64)),
        )
        if generation:
            record["generation"] = generation
        storage.write_json(record_uri(self._work.store, shard), record)
        self._send({"wrote_bytes": size_bytes})

    def _told(self, shard: int, rows: Iterator[Row]) -> Iterator[Row]:
        """Pass rows through and report progress on them."""
        done, told_at = 0, time.monotonic()
        reasons: Counter[str] = Counter()
        self._tell(shard, done, reasons)  # starts the clock for the rate
        for row in rows:
            done += 1
            if "reason" in row:
                reasons[row["reason"]] += 1
            yield row
            if time.monotonic() - told_at > REPORT_EVERY_S:
                told_at = time.monotonic()
                self._tell(shard, done, reasons)
        self._tell(shard, done, reasons)

    def _tell(self, shard: int, done: int, reasons: Mapping[str, int]) -> None:
        bad = sum(count for reason, count in reasons.items() if reason not in filters.REASONS)
        told = {"shard": shard, "done": done, "bad": bad, "quarantined": dict(reasons)}
        self._send({"shard": told})

    def _send(self, message: Row) -> None:
        if self._progress is None:
            return
        try:
            self._progress.put(message)
        except RayActorError as error:
            logger.warning("progress is no longer reported: %s", error)
            self._progress = None


def _without(bad: list[Row], rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows for the store, and append rows for the quarantine to `bad`."""
    for row in rows:
        if "reason" in row:
            bad.append(row)
        else:
            yield row


class _Seen:
    """Counts and histogram values of the clips in a shard."""

    def __init__(self) -> None:
        self.clips = self.salvaged = 0
        self.values: dict[str, list[float]] = {name: [] for name in histograms.EDGES}

    def add(self, rows: list[Row]) -> None:
        """Add some clips."""
        self.clips += len(rows)
        self.salvaged += sum(row["salvaged"] for row in rows)
        for row in rows:
            self.values["short_side"].append(min(row["width"], row["height"]))
            self.values["fps"].append(row["fps"])
            self.values["duration_s"].append(row["duration_s"])
            words = [len(clean_caption(text, filters.NO_LIMIT).split()) for text in row["captions"]]
            self.values["caption_words"] += words
            self.values["captions_per_clip"].append(len(row["captions"]))


def _groups(rows: Iterator[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    for row in rows:
        group.append(row)
        if len(group) == ROWS_PER_GROUP:
            yield group
            group = []
    if group:
        yield group


def _source(row: Row, seed: int) -> ClipSpan:
    return ClipSpan(
        clip_id=row["clip_id"],
        video_uri=row["video_uri"],
        start_s=row["start_s"],
        end_s=row["end_s"],
        seed=(seed, clip_hash(row["clip_id"])),
    )


def _is_unreachable(outcome: Decoded | VideoDecodeError) -> bool:
    return isinstance(outcome, VideoDecodeError) and outcome.reason == "unreachable"


def _is_undecodable(bad: Row) -> bool:
    return bad["reason"] not in filters.REASONS


def _is_due(bad: Row | None, reasons: frozenset[str]) -> bool:
    return bad is not None and bad["reason"] in reasons


def _rejected(row: Row, why: filters.Rejection) -> Row:
    error = VideoDecodeError(row["clip_id"], why.reason, why.message)
    return _quarantined(row, error, attempts=1)


def _quarantined(row: Row, error: VideoDecodeError, attempts: int) -> Row:
    return {
        "clip_id": row["clip_id"],
        "video_uri": row["video_uri"],
        "reason": error.reason,
        "message": error.message,
        "attempts": attempts,
    }


def _stored(row: Row, decoded: Decoded) -> Row:
    facts = decoded.facts
    kept = ("clip_id", "video_id", "video_uri", "start_s", "end_s", "captions")
    return {
        **{name: row[name] for name in (*kept, "split", "source", "extras")},
        "frames": decoded.coded,
        "hashes": decoded.hashes,
        "frame_indices": decoded.frame_indices,
        "width": facts.width,
        "height": facts.height,
        "fps": facts.fps,
        "duration_s": facts.duration_s,
        "num_source_frames": facts.num_source_frames,
        "source_bytes": facts.size_bytes,
        "codec": facts.codec,
        "decoder": facts.decoder,
        "salvaged": facts.salvaged,
        "video_hash": facts.video_hash,
    }
