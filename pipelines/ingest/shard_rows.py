"""Which rows of the manifest belong to each shard of a store."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.clip_store import read_columns
from pipelines.artifacts.manifest import ManifestRows
from pipelines.common import storage

MEMBERS = "shard"
"""Column of a file of members: the shard of each row of the manifest."""

ShardNumbers = npt.NDArray[np.int32]


@dataclass(frozen=True)
class ShardRows:
    """Which rows of a manifest belong to each shard. Small, so it can be sent to workers."""

    sizes: npt.NDArray[np.int64]
    """[shards] int64: number of rows of each shard."""
    members: str | None = None
    """Parquet file with the shard of each row, for a store whose manifest has changed. None: the
    shards are consecutive ranges of rows."""

    @classmethod
    def consecutive(cls, rows: int, shards: int) -> ShardRows:
        """Divide rows evenly into shards that are consecutive ranges."""
        return cls(np.diff(np.linspace(0, rows, shards + 1).astype(np.int64)))

    @classmethod
    def from_members(cls, members: str, shards: int) -> ShardRows:
        """Open a file of members."""
        return cls(np.bincount(_read_members(members), minlength=shards), members)

    @classmethod
    def write(cls, members: str, shard_of: ShardNumbers, shards: int) -> ShardRows:
        """Write a file of members from the shard of each row, [rows] int32."""
        storage.write_table(members, pa.table({MEMBERS: shard_of}))
        _read_members.cache_clear()
        return cls(np.bincount(shard_of, minlength=shards), members)

    def shard_of_each(self) -> ShardNumbers:
        """Return the shard of each row, [rows] int32."""
        if self.members is not None:
            return _read_members(self.members)
        return np.repeat(np.arange(len(self.sizes), dtype=np.int32), self.sizes)

    def read(
        self, manifest: ManifestRows, shard: int, columns: list[str] | None = None
    ) -> list[dict[str, Any]]:
        """Read the rows of a shard, in the order of the manifest."""
        if self.members is None:
            stop = int(self.sizes[: shard + 1].sum())
            return manifest.read(stop - int(self.sizes[shard]), stop, columns)
        return manifest.take(np.flatnonzero(_read_members(self.members) == shard), columns)


@functools.lru_cache(maxsize=1)
def _read_members(uri: str) -> ShardNumbers:
    return read_columns(uri, [MEMBERS])[MEMBERS].to_numpy()
