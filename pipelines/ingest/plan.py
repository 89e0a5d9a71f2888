"""What an ingest will make: where its store lies, and how clips are divided into shards."""

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
    """What is to be made, and where."""

    config: IngestConfig
    manifest: str
    store: str
    quarantine: str
    total: int
    """Clips of the store and its quarantine together."""
    manifest_clips: int
    edges: npt.NDArray[np.int64]

    @property
    def num_shards(self) -> int:
        """Number of shards of the store."""
        return len(self.edges) - 1

    def rows_of(self, shards: list[int]) -> int:
        """Clips of some shards."""
        return int((self.edges[1:] - self.edges[:-1])[shards].sum())


def store_uri(config: IngestConfig) -> str:
    """The folder of the store that a config makes: its name is a hash of how clips are chosen."""
    settings = to_dict(config.sampling)
    if config.filters != FilterConfig():
        settings = {"sampling": settings, "filters": to_dict(config.filters)}
    name = fingerprint(settings) + ("" if config.limit is None else f"-first-{config.limit}")
    return storage.join(storage.resolve(config.output), name)


def plan_ingest(config: IngestConfig) -> IngestPlan:
    """What an ingest will make.

    Raises:
        ManifestError: the manifest cannot be used.
    """
    manifest, store = storage.resolve(config.manifest), store_uri(config)
    manifest_clips = check_manifest(manifest)
    total = min(manifest_clips, config.limit or manifest_clips)
    # Few clips are divided further, so that all workers have some.
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
