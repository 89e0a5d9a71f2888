"""Verifies a finished clip store: each clip is present exactly once and no file has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import simplejpeg
from ray.data import ActorPoolStrategy

from pipelines.artifacts.clip_store import (
    CATALOGUE,
    ClipStore,
    ShardRecord,
    caption_counts,
    more_than,
    record_uri,
    shard_name,
    shard_uri,
)
from pipelines.artifacts.frame_hashes import read_hashes, same_clips
from pipelines.artifacts.manifest import ManifestRows
from pipelines.common import ray_errors, storage
from pipelines.common.progress import Progress
from pipelines.common.waiting import telling_of_wait
from pipelines.ingest.shard_rows import ShardRows
from pipelines.video.config import SamplingConfig
from stgt.errors import ClipStoreError

SHOWN = 5
WORKERS = 2


class ShardVerifier:
    """Verifies shards (a Ray Data actor).

    Reads:
        shard: Number of the shard.
    Adds:
        problem: Description of the first problem found, or an empty string.
    """

    def __init__(self, store: str, quarantine: str, manifest: str, rows: ShardRows) -> None:
        self._store = ClipStore(store)
        self._quarantine = quarantine
        self._manifest = ManifestRows(manifest)
        self._rows = rows

    @ray_errors.errors_as_rows
    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Verify the shards of a batch."""
        problems = [self._check(int(shard)) for shard in batch["shard"]]
        return {"problem": np.array(problems, dtype=object)}

    def _check(self, shard: int) -> str:
        uri = self._store.uri
        listed: ShardRecord = self._store.catalogue["shards"][shard]
        if not storage.exists(record_uri(uri, shard)):
            return f"shard {shard} has no record"
        record: ShardRecord = storage.read_json(record_uri(uri, shard))
        complete = _with_captions(record, listed)
        if differing := [name for name in listed if listed[name] != complete.get(name)]:
            return f"catalogue and record of shard {shard} differ in {', '.join(differing)}"
        clips_uri = shard_uri(uri, shard, record["revision"])
        bad_uri = storage.join(self._quarantine, shard_name(shard, record["revision"]))
        for place, expected in (
            (clips_uri, record["sha256"]),
            (bad_uri, record["quarantine_sha256"]),
        ):
            if not storage.exists(place):
                return f"{place} is missing"
            if storage.digest(place) != expected:
                return f"{place} has changed: its checksum differs from the record"
        clips = storage.read_table(clips_uri, ["clip_id", "captions", "frames"])
        bad = storage.read_table(bad_uri, ["clip_id"])
        if problem := self._check_rows(shard, record, clips, bad):
            return problem
        if problem := self._check_hashes(shard, clips):
            return problem
        found = more_than(caption_counts(clips["captions"]))
        if listed.get("captions", found) != found:
            return f"the catalogue lists other numbers of captions than shard {shard} holds"
        return ""

    def _check_hashes(self, shard: int, clips: pa.Table) -> str:
        """Check that there is a hash for every frame; stores of earlier versions have none."""
        stored = read_hashes(self._store, shard)
        if stored is None:
            return ""
        num_frames = pc.list_value_length(clips["frames"]).to_numpy()  # type: ignore[attr-defined]
        if not same_clips(stored, clips["clip_id"].to_pylist(), num_frames):
            return (
                f"the hashes of shard {shard} are not those of its clips; delete the folder "
                "hashes of the store, whose files are written again when they are needed"
            )
        return ""

    def _check_rows(self, shard: int, record: ShardRecord, clips: pa.Table, bad: pa.Table) -> str:
        if (len(clips), len(bad)) != (record["clips"], record["quarantined"]):
            return (
                f"shard {shard} holds {len(clips)} clips and {len(bad)} in quarantine, but its "
                f"record lists {record['clips']} and {record['quarantined']}"
            )
        wanted = Counter(
            row["clip_id"] for row in self._rows.read(self._manifest, shard, ["clip_id"])
        )
        found = Counter(clips["clip_id"].to_pylist() + bad["clip_id"].to_pylist())
        if wanted != found:
            odd = sorted((wanted - found) | (found - wanted))
            return (
                f"shard {shard} and its quarantine do not hold each clip of the manifest exactly "
                "once: "
                f"{', '.join(odd[:SHOWN])}"
            )
        for clip_id, frames in zip(clips["clip_id"], clips["frames"], strict=True):
            if not _is_right(frames.as_py(), self._store.sampling):
                return f"shard {shard}: the frames of clip {clip_id} cannot be read"
        return ""


def _with_captions(record: Mapping[str, Any], listed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record of a shard with the captions that the catalogue lists for it.

    Records of earlier versions lack them. The catalogue was then computed from the shard, and is
    compared with it.
    """
    return {**{name: listed[name] for name in ("captions",) if name in listed}, **record}


def _is_right(frames: list[bytes], sampling: SamplingConfig) -> bool:
    """Return whether the frames have the number and size of the sampling config.

    A single frame is also valid, because images are stored as one frame.
    """
    if len(frames) not in (1, sampling.num_frames):
        return False
    if sampling.codec == "raw":
        return all(len(frame) == sampling.size**2 * 3 for frame in frames)
    try:
        sizes = {simplejpeg.decode_jpeg_header(frame)[:2] for frame in frames}
    except ValueError:
        return False
    return sizes == {(sampling.size, sampling.size)}


def verify_store(
    store: str,
    quarantine: str,
    manifest: str,
    rows: ShardRows,
    generation: int,
    expected: dict[str, Any] | None,
) -> dict[str, Any]:
    """Verify a store and return its catalogue.

    Args:
        store: Folder of the store.
        quarantine: Folder of its quarantine.
        manifest: Manifest that it was made from.
        rows: Rows of the manifest that belong to each shard.
        generation: How many times the manifest of the store has changed.
        expected: Catalogue computed from the shard records; None if a record is missing.

    Raises:
        ClipStoreError: The store failed verification. The message lists the first problems.
    """
    catalogue = ClipStore(store).catalogue
    count = len(rows.sizes)
    if catalogue.get("generation", 0) != generation:
        raise ClipStoreError(
            f"{store} has not been brought up to date with its changed manifest; run the ingest "
            "again without --verify first"
        )
    if len(catalogue["shards"]) != count:
        raise ClipStoreError(
            f"{storage.join(store, CATALOGUE)} lists {len(catalogue['shards'])} shards instead of "
            f"{count}; delete it and run the ingest again"
        )
    checked = ray.data.from_items([{"shard": shard} for shard in range(count)]).map_batches(
        ShardVerifier,
        fn_constructor_args=(store, quarantine, manifest, rows),
        batch_size=1,
        compute=ActorPoolStrategy(size=min(WORKERS, count)),
        num_cpus=1,
    )
    progress, problems = Progress("verify", count, "shards"), []
    done = 0
    with telling_of_wait("verify", {"CPU": 1}, lambda: done > 0):
        for row in ray_errors.rows(checked):
            done += 1
            progress.advance(1)
            if row["problem"]:
                problems.append(row["problem"])
    problems.sort()
    if expected is not None:
        pairs = zip(expected["shards"], catalogue["shards"], strict=True)
        expected = {**expected, "shards": [_with_captions(*pair) for pair in pairs]}
        differing = [name for name in expected if catalogue.get(name) != expected[name]]
        if differing:
            problems.append(f"the catalogue differs from its shards in {', '.join(differing)}")
    if problems:
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ClipStoreError(
            f"{store} failed verification: {shown}{more}; delete {CATALOGUE} and the .json file of "
            "each damaged shard, and run the ingest again to remake these shards"
        )
    return catalogue
