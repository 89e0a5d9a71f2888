"""Plans an ingest: where the store is written, and how clips are divided into shards."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import STORE, default_quarantine, recorded_sampling
from pipelines.artifacts.locations import find_checkpoint
from pipelines.artifacts.manifest import check_manifest, refuse_web_addresses
from pipelines.common import storage
from pipelines.common.config import fingerprint, to_dict
from pipelines.ingest.config import FilterConfig, IngestConfig
from pipelines.ingest.shard_rows import ShardRows
from stgt.errors import CheckpointError, ClipStoreError, SettingError
from stgt.field_marks import earlier_values, with_earlier_values

CHECKPOINT = "checkpoint"
WEIGHTS = "weights"
"""Entry of the recorded filters: digest of the weights that filters.min_similarity uses."""
LEAST_SHARDS = 16
LEAST_CLIPS_PER_SHARD = 32


class Generation(TypedDict):
    """One manifest in the history of a store. Generation 0 is the manifest that it began with."""

    manifest_sha256: str
    clips: int
    """Number of rows of the manifest."""
    shards: int
    """Number of shards, including those of earlier generations."""
    added: int
    """Number of rows that the generation before does not have."""
    removed: int
    """Number of rows of the generation before that are gone."""
    moved: int
    """How many removed rows are added again with another video or time span."""
    changed: int
    """Number of rows that stayed, with other captions or details."""
    revised: list[int]
    """Shards of earlier generations that are rewritten."""
    again: list[str]
    """Reasons for which clips in the quarantine of revised shards are decoded again."""


@dataclass(frozen=True)
class IngestPlan:
    """The output of an ingest, before it is made."""

    config: IngestConfig
    manifest: str
    store: str
    quarantine: str
    total: int
    """Number of clips in the store and its quarantine together."""
    manifest_clips: int
    rows: ShardRows
    generations: tuple[Generation, ...] = ()
    """History of the store, ascending; empty if its manifest has never changed."""
    weights: str | None = None
    """Digest of the weights that filters.min_similarity uses, wherever they are."""

    @property
    def num_shards(self) -> int:
        """Number of shards of the store."""
        return len(self.rows.sizes)

    @property
    def generation(self) -> int:
        """How many times the manifest has changed."""
        return max(0, len(self.generations) - 1)

    @functools.cached_property
    def due(self) -> npt.NDArray[np.int64]:
        """[shards] int64: generation in which the rows of each shard changed for the last time."""
        due, before = np.zeros(self.num_shards, dtype=np.int64), 0
        for number, one in enumerate(self.generations):
            due[before : one["shards"]] = number
            due[one["revised"]] = number
            before = one["shards"]
        return due

    def rows_of(self, shards: list[int]) -> int:
        """Return the number of clips in some shards."""
        return int(self.rows.sizes[shards].sum())


def store_uri(config: IngestConfig, weights: str | None = None) -> str:
    """Return the folder of the store for a config. Its name is a hash of sampling and filters.

    Args:
        config: Settings of the ingest.
        weights: Digest of the weights of filters.checkpoint.
    """
    settings = recorded_sampling(config.sampling)
    if config.filters != FilterConfig():
        settings = {"sampling": settings, "filters": recorded_filters(config.filters, weights)}
    name = fingerprint(settings) + ("" if config.limit is None else f"-first-{config.limit}")
    return storage.join(storage.resolve(config.output), name)


def recorded_filters(filters: FilterConfig, weights: str | None = None) -> dict[str, Any]:
    """Return the filters as a store records them.

    Those that earlier versions did not have are left out unless they are used, so that stores of
    these versions stay the same. A checkpoint is recorded by the digest of its weights, so that it
    may be moved.
    """
    earlier = earlier_values(FilterConfig)
    found = {
        name: value
        for name, value in to_dict(filters).items()
        if name not in earlier or value != earlier[name]
    }
    if found.pop(CHECKPOINT, None) is not None:
        found[WEIGHTS] = weights
    return found


def _with_checked_model(config: IngestConfig) -> tuple[IngestConfig, str | None]:
    """Return a config with the absolute URI of the model of its filters, and its weights' digest.

    A store can be verified without its model, so then the digest is that of the store.

    Raises:
        CheckpointError: The checkpoint cannot be used.
        SettingError: The stored frames do not suit the model.
        ClipStoreError: The model is gone, and stores with different weights could be verified.
    """
    if config.filters.checkpoint is None:
        return config, None
    try:
        uri = find_checkpoint(config.filters.checkpoint)
        checkpoints.require(uri)
    except CheckpointError:
        if not config.verify:
            raise
        return config, _weights_of_the_store(config)
    config = replace(config, filters=replace(config.filters, checkpoint=uri))
    if config.verify:
        return config, checkpoints.weights_digest(uri)
    inputs, sampling = checkpoints.model_config(uri).inputs, config.sampling
    if sampling.size != inputs.image_size or sampling.num_frames < inputs.num_frames:
        raise SettingError(
            f"filters.checkpoint: {uri} takes {inputs.num_frames} frames of {inputs.image_size} "
            f"pixels, but the store is to have {sampling.num_frames} of {sampling.size}; set "
            f"--sampling.size {inputs.image_size} and --sampling.num-frames to at least "
            f"{inputs.num_frames}, or choose another checkpoint"
        )
    checkpoints.check_vocabulary(uri)
    return config, checkpoints.weights_digest(uri)


def _weights_of_the_store(config: IngestConfig) -> str | None:
    """Return the digest of the weights of the store whose other settings are those of a config."""
    output = storage.resolve(config.output)
    found = []
    for name in storage.list_names(output):
        uri = storage.join(output, name, STORE)
        filters = storage.read_json(uri).get("filters", {}) if storage.exists(uri) else {}
        if WEIGHTS in filters and storage.name_of(store_uri(config, filters[WEIGHTS])) == name:
            found.append(filters[WEIGHTS])
    if len(found) > 1:
        raise ClipStoreError(
            f"filters.checkpoint: {config.filters.checkpoint} is gone, and {len(found)} stores in "
            f"{output} differ only in the weights of their checkpoints; give the checkpoint of the "
            "store to verify"
        )
    return found[0] if found else None


def with_rules_of_the_store(config: IngestConfig, weights: str | None = None) -> IngestConfig:
    """Return a config with the sampling rules of the version that began the store, if there is one.

    Rules are not settings: without this, a store of an earlier version would be made anew.
    """
    earlier = replace(config, sampling=with_earlier_values(config.sampling, ()))
    places = [storage.join(store_uri(one, weights), STORE) for one in (config, earlier)]
    if storage.exists(places[0]) or not storage.exists(places[1]):
        return config
    return earlier


def num_shards(rows: int, clips_per_shard: int) -> int:
    """Return the number of shards for some rows."""
    # Small manifests get smaller shards, so that there is work for several workers.
    fewest = min(LEAST_SHARDS, rows // LEAST_CLIPS_PER_SHARD)
    return max(1, fewest, round(rows / clips_per_shard))


def plan_ingest(config: IngestConfig) -> IngestPlan:
    """Plan an ingest into a new store.

    Raises:
        ManifestError: The manifest cannot be used.
        SettingError: The quarantine cannot be a folder, or the model of the filters takes other
            frames.
        CheckpointError: The model of the filters cannot be used.
    """
    manifest = storage.resolve(config.manifest)
    manifest_clips = check_manifest(manifest)
    refuse_web_addresses(manifest)
    config, weights = _with_checked_model(config)
    config = with_rules_of_the_store(config, weights)
    store = store_uri(config, weights)
    total = min(manifest_clips, config.limit or manifest_clips)
    quarantine = default_quarantine(store)
    if config.quarantine is not None:
        quarantine = storage.join(storage.resolve(config.quarantine), storage.name_of(store))
        _refuse_file(quarantine)
    return IngestPlan(
        config=config,
        manifest=manifest,
        store=store,
        quarantine=quarantine,
        total=total,
        manifest_clips=manifest_clips,
        rows=ShardRows.consecutive(total, num_shards(total, config.clips_per_shard)),
        weights=weights,
    )


def _refuse_file(quarantine: str) -> None:
    """Raise a SettingError if a file is where the quarantine's folder would be, or one above it.

    Otherwise, this would be noticed only once the first shard is decoded.
    """
    if not storage.is_local(quarantine):
        return
    for place in (Path(quarantine), *Path(quarantine).parents):
        if place.exists() and not place.is_dir():
            raise SettingError(
                f"quarantine: {place} is a file, but a folder is needed there; choose another one"
            )
