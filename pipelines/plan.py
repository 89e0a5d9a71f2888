"""Which clip is sample number p of epoch e: a pure function of (seed, e, p).

Shards come in a permuted order, and rows in a permuted order within each shard, so a data worker
reads a shard once per epoch. Positions run on over epochs: position q is sample q % N of epoch q
// N, and step g of a run takes positions [g * global_batch, (g + 1) * global_batch). Every clip is
used exactly once per epoch, whatever the number of workers, and a restart needs only the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@lru_cache(maxsize=64)
def _permutation(size: int, *key: int) -> IntArray:
    order = np.random.default_rng(key).permutation(size)
    order.setflags(write=False)
    return order


class SamplePlan:
    """The order in which a store's clips are used, epoch after epoch."""

    def __init__(self, shard_sizes: Sequence[int], seed: int) -> None:
        """Plan over shards of the given sizes.

        Args:
            shard_sizes: clips in each shard.
            seed: another seed gives another order.

        Raises:
            ValueError: there are no clips.
        """
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.num_clips = int(self.shard_sizes.sum())
        if self.num_clips == 0:
            raise ValueError("the clip store holds no clips to train on")

    def locate(self, positions: IntArray) -> dict[str, IntArray]:
        """Epoch, shard and row of samples.

        Args:
            positions: [n] int64, global positions q >= 0.

        Returns:
            `epoch`, `shard` and `row`, each [n] int64; `row` counts within the shard.
        """
        positions = np.asarray(positions, dtype=np.int64)
        epochs, samples = np.divmod(positions, self.num_clips)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            order = _permutation(len(self.shard_sizes), self.seed, int(epoch))
            ends = self.shard_sizes[order].cumsum()
            of_epoch = np.flatnonzero(epochs == epoch)
            place = np.searchsorted(ends, samples[of_epoch], side="right")
            shards[of_epoch] = order[place]
            offset = samples[of_epoch] - (ends[place] - self.shard_sizes[order[place]])
            for shard in np.unique(order[place]):
                inside = order[place] == shard
                size = int(self.shard_sizes[shard])
                permuted = _permutation(size, self.seed, int(epoch), int(shard))
                rows[of_epoch[inside]] = permuted[offset[inside]]
        return {"epoch": epochs, "shard": shards, "row": rows}
