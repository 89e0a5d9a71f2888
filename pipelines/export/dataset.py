"""Writes a clip store as a Parquet data set of the Hugging Face Hub, on Ray Data."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypedDict

from pipelines.artifacts.clip_store import STORE, ClipStore, read_columns, shard_uri
from pipelines.common import storage
from pipelines.export.card import SplitFigures, card
from pipelines.export.claim import claim_output, remove_leftovers
from pipelines.export.config import ExportConfig
from pipelines.export.dataset_form import (
    CARD,
    DATA,
    EXPORTED,
    STORE_PART,
    ExportedShard,
    data_file,
    split_names,
)
from pipelines.export.records import is_folder_name
from pipelines.export.store_files import catalogue_uri, copy_files, copy_records, require_current
from stgt.errors import ClipStoreError

logger = logging.getLogger(__name__)

FilesOfShard = dict[str, str]
"""Path of the file for each value of the column `split`."""


class DatasetSummary(TypedDict):
    """Result of an export as a data set."""

    output: str
    clips: int
    splits: dict[str, int]
    files: int
    bytes: int


def export_dataset(
    config: ExportConfig, connect: Callable[[ExportConfig], None] | None = None
) -> DatasetSummary:
    """Write a clip store as a data set, or what is missing of it.

    Raises:
        ClipStoreError: The store is not finished, not up to date, or damaged.
        STGTError: The output holds something else.
    """
    assert config.store is not None
    store, output = ClipStore(config.store), storage.resolve(config.output)
    require_current(store)
    name = storage.name_of(store.uri)
    if not is_folder_name(name):  # otherwise the store could not be made again
        raise ClipStoreError(
            f"the folder {store.uri!r} has a name that not every file system allows; rename it"
        )
    with storage.lock(output):
        claim = {
            "kind": "dataset",
            "store": name,
            "catalogue_sha256": storage.digest(catalogue_uri(store.uri)),
        }
        claim_output(output, claim, store.uri)
        splits = _splits_of_shards(store)
        names = split_names({split for counts in splits for split in counts})
        files_of = _files(splits, names)
        part = storage.join(output, STORE_PART)
        records = _exported(output)
        due = [shard for shard in range(len(splits)) if shard not in records]
        if due or not storage.exists(storage.join(output, CARD)):
            if connect is not None:
                connect(config)
            _write(config, store, output, files_of, due, records)
            remove_leftovers(storage.join(output, DATA), storage.join(part, EXPORTED))
            copy_files(store.uri, part, store.catalogue, store.quarantine)
            copy_records(store.uri, part, len(splits))
            for name in (storage.join(store.uri, STORE), catalogue_uri(store.uri)):
                copied = storage.join(part, storage.name_of(name))
                storage.write_bytes(copied, storage.read_bytes(name))
        else:
            logger.info("the data set is already written")
        records = _exported(output)
        figures = _figures(splits, names, files_of, output)
        storage.write_bytes(storage.join(output, CARD), card(store, figures).encode())
    return DatasetSummary(
        output=output,
        clips=store.num_clips,
        splits={name: one.clips for name, one in figures.items()},
        files=sum(len(record["files"]) for record in records.values()),
        bytes=sum(record["bytes"] for record in records.values()),
    )


def _splits_of_shards(store: ClipStore) -> list[Counter[str]]:
    """Return the number of clips of each split, for each shard."""

    def read(shard: int) -> Counter[str]:
        revision = int(store.catalogue["shards"][shard].get("revision", 0))
        column = read_columns(shard_uri(store.uri, shard, revision), ["split"])["split"]
        return Counter(split or "" for split in column.to_pylist())

    with ThreadPoolExecutor(storage.READERS) as pool:
        return list(pool.map(read, range(len(store.shard_sizes))))


def _files(splits: list[Counter[str]], names: Mapping[str, str]) -> list[FilesOfShard]:
    """Number the files of each split, one for each shard with clips of that split."""
    totals = Counter(split for counts in splits for split in counts)
    seen: Counter[str] = Counter()
    files_of: list[FilesOfShard] = []
    for counts in splits:
        files: FilesOfShard = {}
        for split in sorted(counts):
            files[split] = data_file(names[split], seen[split], totals[split])
            seen[split] += 1
        files_of.append(files)
    return files_of


def _exported(output: str) -> dict[int, ExportedShard]:
    """Read the records of the shards that are already exported, by their number."""
    folder = storage.join(output, STORE_PART, EXPORTED)
    names = [name for name in storage.list_names(folder) if name.endswith(".json")]
    return {record["shard"]: record for record in storage.read_jsons(folder, names)}


def _write(
    config: ExportConfig,
    store: ClipStore,
    output: str,
    files_of: list[FilesOfShard],
    due: list[int],
    records: Mapping[int, ExportedShard],
) -> None:
    # Ray loads slowly, so it is imported only after all checks.
    from pipelines.common.progress import Progress
    from pipelines.export.dataset_writer import ShardExporter
    from pipelines.export.workers import run_workers

    if records:
        logger.info("export resumes: %d of %d shards are finished", len(records), len(files_of))
    done = sum(record["clips"] for record in records.values())
    run_workers(
        ShardExporter,
        (store.uri, output, files_of),
        due,
        Progress("export", store.num_clips, "clips", done),
        config.num_workers,
    )


def _figures(
    splits: list[Counter[str]],
    names: Mapping[str, str],
    files_of: list[FilesOfShard],
    output: str,
) -> dict[str, SplitFigures]:
    """Return the size of each split, by its name in the data set."""
    clips = sum(splits, Counter[str]())
    places = [(split, file) for files in files_of for split, file in files.items()]
    with ThreadPoolExecutor(storage.READERS) as pool:
        sizes = pool.map(lambda one: storage.size_bytes(storage.join(output, one[1])), places)
        bytes_of: Counter[str] = Counter()
        for (split, _), size_bytes in zip(places, sizes, strict=True):
            bytes_of[split] += size_bytes
    return {names[split]: SplitFigures(clips[split], bytes_of[split]) for split in sorted(clips)}
