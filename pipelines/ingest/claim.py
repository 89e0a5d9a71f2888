"""Claims the folder of a store: for a new store, an unfinished one, or one whose manifest changed.

`store.json` records settings and manifest of the store, and a history if its manifest has changed.
It and a copy of the manifest are written before any shard is touched, and the catalogue after all
shards. A killed run is therefore continued by the next one, and readers use the old catalogue until
the new one is complete.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.clip_store import (
    CATALOGUE,
    STORE,
    ShardRecord,
    finished_shards,
    manifest_uri,
    members_uri,
    read_columns,
    recorded_sampling,
    shard_name,
    shard_uri,
)
from pipelines.artifacts.manifest import ROWS_PER_GROUP, SCHEMA, ManifestRows, clip_hash
from pipelines.common import storage
from pipelines.common.output_folder import CONFIG
from pipelines.ingest import filters, growth
from pipelines.ingest.plan import Generation, IngestPlan, num_shards, recorded_filters
from pipelines.ingest.shard_rows import ShardRows
from pipelines.video import decoder
from stgt.errors import ClipStoreError

logger = logging.getLogger(__name__)

MOST_REMOVED = 0.1
"""Fraction of the rows of a store that may leave it without `allow_removals`."""


def claim_store(plan: IngestPlan) -> IngestPlan:
    """Record what a store is made of, and return the plan for what is to be done with it.

    A store whose manifest has changed is compared with the new manifest. Its plan keeps all rows
    that stay in their shards.

    Raises:
        ClipStoreError: The folder holds a store with other settings, the manifest has changed and
            the store is only to be verified or retried, or too many rows would leave the store.
    """
    digest = storage.digest(plan.manifest)
    identity = {
        "sampling": recorded_sampling(plan.config.sampling),
        "filters": recorded_filters(plan.config.filters, plan.weights),
        "manifest_sha256": digest,
        "clips": plan.total,
        "shards": plan.num_shards,
        "quarantine": None if plan.config.quarantine is None else plan.quarantine,
    }
    only_checked = plan.config.verify or plan.config.retry_quarantined is not None
    store = storage.join(plan.store, STORE)
    found = storage.read_json(store) if storage.exists(store) else None
    if found is None or not (only_checked or _has_results(plan.store)):
        _keep_manifest(plan, 0)
        storage.write_json(store, identity)
        return plan
    differing = [
        name for name in ("sampling", "filters", "quarantine") if found.get(name) != identity[name]
    ]
    if found["manifest_sha256"] == digest:
        plan = _plan_of(plan, found)
        if found["clips"] != plan.total:
            differing.append("clips")
        if found["shards"] != _expected_shards(plan):
            differing.append("shards")
    elif only_checked and not differing:
        raise ClipStoreError(
            f"{plan.store} holds a store made with another manifest than {plan.manifest}; run the "
            "ingest without --verify and --retry-quarantined first, which adds the new clips"
        )
    if differing:
        raise ClipStoreError(
            f"{plan.store} holds a store made with another {', '.join(differing)}; "
            "choose another output folder, or delete this one"
        )
    if found["manifest_sha256"] != digest:
        return _change_manifest(plan, found, identity)
    if not plan.config.verify and not storage.exists(manifest_uri(plan.store, plan.generation)):
        _keep_manifest(plan, plan.generation)  # stores of earlier versions have none
    return plan


def _has_results(store: str) -> bool:
    shards = storage.list_names(storage.join(store, "shards"))
    return any(name.endswith(".json") for name in shards) or storage.exists(
        storage.join(store, CATALOGUE)
    )


def _keep_manifest(plan: IngestPlan, generation: int) -> None:
    """Copy the rows of the manifest that belong to the store into its folder."""
    target = manifest_uri(plan.store, generation)
    if plan.total < plan.manifest_clips:
        table = ManifestRows(plan.manifest).table(0, plan.total)
        storage.write_table(target, table, ROWS_PER_GROUP)
        return
    with storage.as_local(plan.manifest) as path:
        storage.put_file(path, target)


def _plan_of(plan: IngestPlan, found: Mapping[str, Any]) -> IngestPlan:
    """Return the plan of a store as its record describes it."""
    generations = tuple(found.get("generations", ()))
    if not generations:
        return plan
    members = members_uri(plan.store, len(generations) - 1)
    if not storage.exists(members):
        raise ClipStoreError(f"{members} is missing; restore it, or choose another output folder")
    rows = ShardRows.from_members(members, int(found["shards"]))
    return replace(plan, rows=rows, generations=generations)


def _expected_shards(plan: IngestPlan) -> int:
    if not plan.generations:
        return plan.num_shards
    before, now = plan.generations[-2:]
    return before["shards"] + _new_shards(now["added"], plan.config.clips_per_shard)


def _new_shards(added: int, clips_per_shard: int) -> int:
    return num_shards(added, clips_per_shard) if added else 0


def _change_manifest(
    plan: IngestPlan, found: Mapping[str, Any], identity: Mapping[str, Any]
) -> IngestPlan:
    """Compare a store with a changed manifest, and record what becomes of each row."""
    history = tuple(found.get("generations", ())) or (_first_generation(found),)
    before = history[-1]
    with _stored_rows(plan, found) as stored:
        difference = growth.compare(stored, ManifestRows(plan.manifest), plan.total)
        uncertain = stored.uncertain is not None
    _refuse_removals(plan, difference, int(before["clips"]))
    count = _new_shards(difference.added, plan.config.clips_per_shard)
    shard_of = difference.shard_of.copy()
    sizes = ShardRows.consecutive(difference.added, count).sizes
    shard_of[shard_of == growth.ADDED] = np.repeat(
        np.arange(before["shards"], before["shards"] + count, dtype=np.int32), sizes
    )
    again = _reasons_again(plan, difference, uncertain)
    revised = set(difference.revised.tolist())
    if again:
        records = finished_shards(plan.store)
        revised |= {shard for shard, one in records.items() if again & one["reasons"].keys()}
    now = Generation(
        manifest_sha256=identity["manifest_sha256"],
        clips=plan.total,
        shards=before["shards"] + count,
        added=difference.added,
        removed=difference.removed,
        moved=difference.moved,
        changed=difference.changed,
        revised=sorted(revised),
        again=sorted(again),
    )
    logger.info(
        "the manifest has changed: %s clips are added in %d shards, %s removed, and %s changed; "
        "%d of %d earlier shards are rewritten",
        f"{difference.added:,}",
        count,
        f"{difference.removed:,}",
        f"{difference.changed:,}",
        len(revised),
        before["shards"],
    )
    number = len(history)
    members = members_uri(plan.store, number)
    rows = ShardRows.write(members, shard_of, now["shards"])
    _keep_manifest(plan, number)
    generations = (*history, now)
    record = {**identity, "shards": now["shards"], "generations": generations}
    storage.write_json(storage.join(plan.store, STORE), record)
    return replace(plan, rows=rows, generations=generations)


def _first_generation(found: Mapping[str, Any]) -> Generation:
    return Generation(
        manifest_sha256=found["manifest_sha256"],
        clips=found["clips"],
        shards=found["shards"],
        added=found["clips"],
        removed=0,
        moved=0,
        changed=0,
        revised=[],
        again=[],
    )


def _refuse_removals(plan: IngestPlan, difference: growth.Difference, before: int) -> None:
    if plan.config.allow_removals or difference.removed <= MOST_REMOVED * before:
        return
    raise ClipStoreError(
        f"{difference.removed} of the {before} clips of {plan.store} would leave it, more than "
        f"{MOST_REMOVED:.0%}, because {plan.manifest} does not contain them "
        f"({difference.removed - difference.moved}) or gives them another video or time span "
        f"({difference.moved}); pass --allow-removals to remove them, or choose another output "
        "folder"
    )


def _reasons_again(
    plan: IngestPlan, difference: growth.Difference, uncertain: bool
) -> frozenset[str]:
    """Return the reasons for which clips in quarantine are decoded again.

    A duplicate comes back once the clip that it duplicates has left, has other captions, or is a
    duplicate by the other filter. Which of several near duplicates stays may also depend on clips
    that are added. The similarity of a clip changes with its captions. Other details, such as
    generated captions, which are in the extras, change none of this.
    """
    if uncertain:
        return frozenset([*decoder.REASONS, *filters.REASONS])
    asked = {
        "duplicate_caption": plan.config.filters.unique_captions,
        "duplicate_video": plan.config.filters.unique_videos,
    }
    may_return = (
        difference.removed or difference.recaptioned or (all(asked.values()) and difference.added)
    )
    again = {name for name, is_asked in asked.items() if is_asked and may_return}
    if plan.config.filters.near_duplicates is not None and (may_return or difference.added):
        again.add("near_duplicate")
    if plan.config.filters.min_similarity is not None and difference.recaptioned:
        again.add("low_similarity")
    return frozenset(again)


@contextmanager
def _stored_rows(plan: IngestPlan, found: Mapping[str, Any]) -> Iterator[growth.StoredRows]:
    """Provide the rows of a store from its copy of the manifest.

    Stores of earlier versions have no copy. For these, the manifest is read from its earlier place
    if it is still the same, or else put together from the shards.
    """
    generation = max(0, len(found.get("generations", ())) - 1)
    copy = manifest_uri(plan.store, generation)
    rows = ShardRows.consecutive(int(found["clips"]), int(found["shards"]))
    if generation:
        rows = _plan_of(plan, found).rows
    if storage.exists(copy):
        yield growth.StoredRows(ManifestRows(copy), rows.shard_of_each())
        return
    if generation:
        raise ClipStoreError(f"{copy} is missing; restore it, or choose another output folder")
    earlier = _earlier_manifest(plan.store)
    if earlier is not None and storage.digest(earlier) == found["manifest_sha256"]:
        yield growth.StoredRows(ManifestRows(earlier), rows.shard_of_each())
        return
    with TemporaryDirectory() as folder:
        yield _rows_of_shards(plan, Path(folder) / "manifest.parquet")


def _earlier_manifest(store: str) -> str | None:
    """Return the manifest that the last ingest of a store was given, if it is still there."""
    config = storage.join(store, CONFIG)
    if not storage.exists(config):
        return None
    uri = storage.resolve(storage.read_json(config)["manifest"])
    return uri if storage.exists(uri) else None


def _rows_of_shards(plan: IngestPlan, path: Path) -> growth.StoredRows:
    """Put the manifest of a store together from its shards and its quarantine.

    Only id and video are known of clips in quarantine.
    """
    records = sorted(finished_shards(plan.store).items())
    shards, uncertain = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=bool)]
    with pq.ParquetWriter(path, SCHEMA) as writer, ThreadPoolExecutor(storage.READERS) as pool:
        remaining = iter(records)
        while part := list(islice(remaining, storage.READERS)):  # bounds the memory
            tables = pool.map(lambda one: _rows_of_shard(plan, *one), part)
            for (shard, _), (table, is_bad) in zip(part, tables, strict=True):
                writer.write_table(table, ROWS_PER_GROUP)
                shards.append(np.full(len(table), shard, dtype=np.int32))
                uncertain.append(is_bad)
    return growth.StoredRows(
        ManifestRows(str(path)), np.concatenate(shards), np.concatenate(uncertain)
    )


def _rows_of_shard(
    plan: IngestPlan, shard: int, record: ShardRecord
) -> tuple[pa.Table, growth.Mask]:
    """Return the rows of a shard as rows of a manifest, and which of them are in quarantine."""
    name = shard_name(shard, record["revision"])
    columns = [name for name in SCHEMA.names if name != "clip_hash"]
    stored = read_columns(shard_uri(plan.store, shard, record["revision"]), columns)
    bad = read_columns(storage.join(plan.quarantine, name), ["clip_id", "video_uri"])
    unknown = {"video_id": "", "captions": [], "split": "", "source": "", "extras": ""}
    rows = [*stored.to_pylist(), *({**unknown, **row} for row in bad.to_pylist())]
    hashes = np.array([clip_hash(row["clip_id"]) for row in rows], dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    table = pa.Table.from_pylist(
        [{**rows[place], "clip_hash": int(hashes[place])} for place in order], schema=SCHEMA
    )
    return table, order >= len(stored)
