"""Copies the files of a clip store other than its clips, to a data set and back."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.artifacts import caption_similarity, frame_hashes
from pipelines.artifacts.clip_store import (
    CATALOGUE,
    STORE,
    ClipStore,
    default_quarantine,
    manifest_uri,
    members_uri,
    record_uri,
    shard_name,
)
from pipelines.common import storage
from stgt.errors import ClipStoreError

REPORTS = ("report.html", "report.json")
BESIDE_SHARDS = (
    (frame_hashes.hashes_uri, frame_hashes.OF_SHARD),
    (caption_similarity.scores_uri, caption_similarity.OF_SHARD),
)
"""What a store may keep about the clips of a shard: where it is, and the entry of its metadata with
the checksum of the shard."""


def require_current(store: ClipStore) -> None:
    """Check that a finished store is not being changed.

    Raises:
        ClipStoreError: Its manifest has changed since its catalogue was written, or it lacks what
            a store is made again from.
    """
    generation = int(store.catalogue.get("generation", 0))
    record = storage.read_json(storage.join(store.uri, STORE))
    if generation != max(0, len(record.get("generations", ())) - 1):
        raise ClipStoreError(
            f"{store.uri} has not been brought up to date with its changed manifest; run the "
            "ingest again first"
        )
    if not storage.exists(manifest_uri(store.uri, generation)):
        raise ClipStoreError(
            f"{store.uri} has no copy of its manifest, because an earlier version wrote it; run "
            "the ingest again, which adds the copy"
        )


def copy_files(source: str, target: str, catalogue: dict, quarantine: str) -> None:
    """Copy everything that belongs to a store except clips, `store.json` and the catalogue.

    Args:
        source: Folder with the files: a store, or such a copy.
        target: Folder for the copies.
        catalogue: Catalogue of the store.
        quarantine: Folder with the quarantine of the source.
    """
    generation = int(catalogue.get("generation", 0))
    pairs = [(manifest_uri(source, generation), manifest_uri(target, generation))]
    if generation:
        pairs.append((members_uri(source, generation), members_uri(target, generation)))
    optional = [(storage.join(source, name), storage.join(target, name)) for name in REPORTS]
    for listed in catalogue["shards"]:
        shard, revision = int(listed["shard"]), int(listed.get("revision", 0))
        name = shard_name(shard, revision)
        pairs.append(
            (storage.join(quarantine, name), storage.join(default_quarantine(target), name))
        )
        optional += (
            (place(source, shard, revision), place(target, shard, revision))
            for place, _ in BESIDE_SHARDS
        )
    _copy_all(pairs, missing_is_fine=False)
    _copy_all(optional, missing_is_fine=True)


def copy_records(source: str, target: str, shards: int) -> None:
    """Copy the records of a store's shards."""
    _copy_all(
        [(record_uri(source, shard), record_uri(target, shard)) for shard in range(shards)],
        missing_is_fine=False,
    )


def _copy_all(pairs: Sequence[tuple[str, str]], missing_is_fine: bool) -> None:
    def copy(pair: tuple[str, str]) -> None:
        source, target = pair
        if missing_is_fine and not storage.exists(source):
            return
        with storage.as_local(source) as path:
            storage.put_file(path, target)

    with ThreadPoolExecutor(storage.READERS) as pool:
        for _ in pool.map(copy, pairs):
            pass


def catalogue_uri(store: str) -> str:
    """Return the URI of a store's catalogue."""
    return storage.join(store, CATALOGUE)
