"""Plans an ingest: where the store is written, and how clips are divided into shards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.clip_store import default_quarantine
from pipelines.artifacts.manifest import check_manifest
from pipelines.common import storage
from pipelines.common.config import fingerprint, to_dict
from pipelines.ingest.config import FilterConfig, IngestConfig

LEAST_SHARDS = 16
LEAST_CLIPS_PER_SHARD = 32


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
    edges: npt.NDArray[np.int64]

    @property
    def num_shards(self) -> int:
        """Number of shards of the store."""
        return len(self.edges) - 1

    def rows_of(self, shards: list[int]) -> int:
        """Return the number of clips in some shards."""
        return int((self.edges[1:] - self.edges[:-1])[shards].sum())


def store_uri(config: IngestConfig) -> str:
    """Return the folder of the store for a config. Its name is a hash of sampling and filters."""
    settings = to_dict(config.sampling)
    if config.filters != FilterConfig():
        settings = {"sampling": settings, "filters": to_dict(config.filters)}
    name = fingerprint(settings) + ("" if config.limit is None else f"-first-{config.limit}")
    return storage.join(storage.resolve(config.output), name)


def plan_ingest(config: IngestConfig) -> IngestPlan:
    """Plan an ingest.

    Raises:
        ManifestError: The manifest cannot be used.
    """
    manifest, store = storage.resolve(config.manifest), store_uri(config)
    manifest_clips = check_manifest(manifest)
    total = min(manifest_clips, config.limit or manifest_clips)
    # Small manifests get smaller shards, so that there is work for several workers.
    fewest = min(LEAST_SHARDS, total // LEAST_CLIPS_PER_SHARD)
    num_shards = max(1, fewest, round(total / config.clips_per_shard))
    return IngestPlan(
        config=config,
        manifest=manifest,
        store=store,
        quarantine=default_quarantine(store)
        if config.quarantine is None
        else storage.join(storage.resolve(config.quarantine), storage.name_of(store)),
        total=total,
        manifest_clips=manifest_clips,
        edges=np.linspace(0, total, num_shards + 1).astype(np.int64),
    )
