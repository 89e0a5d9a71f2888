"""Makes a clip store from a data set that was exported from one, on Ray Data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypedDict

from pipelines.artifacts.clip_store import STORE, ShardRecord, finished_shards
from pipelines.common import storage
from pipelines.common.output_folder import write_config
from pipelines.export.claim import CLAIM, claim_output, remove_leftovers
from pipelines.export.config import ExportConfig
from pipelines.export.dataset_form import CARD, EXPORTED, STORE_PART, exported_uri
from pipelines.export.records import read_catalogue, read_claim, read_identity
from pipelines.export.store_files import catalogue_uri, copy_files
from stgt.errors import ClipStoreError

logger = logging.getLogger(__name__)


class StoreSummary(TypedDict):
    """Result of making a store from a data set."""

    store: str
    clips: int
    quarantined: int
    shards: int
    identical_shards: int
    """Number of shards with the same bytes as in the store that was exported. The others hold the
    same rows, written by another version of Arrow."""
    bytes: int


def restore_store(
    config: ExportConfig, connect: Callable[[ExportConfig], None] | None = None
) -> StoreSummary:
    """Make the clip store that a data set was exported from, or what is missing of it.

    Every shard is compared with the checksum of the rows that were exported.

    Raises:
        ClipStoreError: The folder is no such data set, is not complete, or has changed.
        STGTError: The output holds something else.
    """
    assert config.dataset is not None
    dataset = storage.resolve(config.dataset)
    name, catalogue = _opened(dataset)
    part = storage.join(dataset, STORE_PART)
    identity = read_identity(part, catalogue)
    store = storage.join(storage.resolve(config.output), name)
    count = len(catalogue["shards"])
    with storage.lock(store):
        claim = {"kind": "store", "catalogue_sha256": storage.digest(catalogue_uri(part))}
        claim_output(store, claim, dataset)
        records = finished_shards(store)
        if not storage.exists(catalogue_uri(store)):
            due = [shard for shard in range(count) if shard not in records]
            if connect is not None:
                connect(config)
            copy_files(part, store, catalogue, storage.join(part, "quarantine"))
            storage.write_json(storage.join(store, STORE), {**identity, "quarantine": None})
            _make(config, catalogue, dataset, store, due)
            remove_leftovers(storage.join(store, "shards"))
            records = finished_shards(store)
            write_config(store, "export", config)
            found = _catalogue(catalogue, records)
            if found == catalogue:
                data = storage.read_bytes(catalogue_uri(part))
                storage.write_bytes(catalogue_uri(store), data)
            else:
                storage.write_json(catalogue_uri(store), found)
        else:
            logger.info("the store is already made")
    listed = {shard["shard"]: shard["sha256"] for shard in catalogue["shards"]}
    return StoreSummary(
        store=store,
        clips=catalogue["clips"],
        quarantined=catalogue["quarantined"],
        shards=count,
        identical_shards=sum(records[shard]["sha256"] == listed[shard] for shard in range(count)),
        bytes=sum(record["bytes"] for record in records.values()),
    )


def _opened(dataset: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the exported store, and its catalogue."""
    part = storage.join(dataset, STORE_PART)
    for uri in (storage.join(dataset, CLAIM), catalogue_uri(part), storage.join(dataset, CARD)):
        if not storage.exists(uri):
            raise ClipStoreError(
                f"{dataset} is not a complete data set that jobs.export wrote from a clip store: "
                f"{uri} is missing; finish the export, or give such a data set"
            )
    name, catalogue_sha256 = read_claim(dataset)
    if catalogue_sha256 != storage.digest(catalogue_uri(part)):
        raise ClipStoreError(
            f"{catalogue_uri(part)} has changed since the export; fetch it again, or export the "
            "store again"
        )
    catalogue = read_catalogue(part)
    folder = storage.join(part, EXPORTED)
    found = set(storage.list_names(folder))
    for shard in range(len(catalogue["shards"])):
        if storage.name_of(exported_uri(dataset, shard)) not in found:
            raise ClipStoreError(
                f"{folder} has no record of shard {shard}; fetch the data set again, or export "
                "the store again"
            )
    return name, catalogue


def _make(
    config: ExportConfig, catalogue: dict[str, Any], dataset: str, store: str, due: list[int]
) -> None:
    # Ray loads slowly, so it is imported only after all checks.
    from pipelines.common.progress import Progress
    from pipelines.export.restore_worker import ShardRestorer
    from pipelines.export.workers import run_workers

    count = len(catalogue["shards"])
    if len(due) < count:
        logger.info("export resumes: %d of %d shards are finished", count - len(due), count)
    left = sum(catalogue["shards"][shard]["clips"] for shard in due)
    total = int(catalogue["clips"])
    run_workers(
        ShardRestorer,
        (dataset, store),
        due,
        Progress("export", total, "clips", total - left),
        config.num_workers,
    )


def _catalogue(catalogue: dict[str, Any], records: dict[int, ShardRecord]) -> dict[str, Any]:
    """Return the catalogue with the sizes and checksums of the shards that were made."""
    shards = [
        {**shard, **{name: records[shard["shard"]][name] for name in ("bytes", "sha256")}}
        for shard in catalogue["shards"]
    ]
    return {
        **catalogue,
        "bytes": sum(shard["bytes"] for shard in shards),
        "digest": storage.digest_of("".join(shard["sha256"] for shard in shards).encode()),
        "shards": shards,
    }
