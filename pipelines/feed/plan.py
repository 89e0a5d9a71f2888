"""Determines which clip is at which position of a training run, as a pure function of the seed.

Shards are permuted, and rows are permuted within each shard, so a data worker reads each shard once
per epoch. Positions continue across epochs: position q is sample q % N of epoch q // N, and step g
of a run takes positions [g * global_batch, (g + 1) * global_batch). Each clip is used exactly once
per epoch for any number of workers, and resuming requires only the step.
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
    """The order in which the clips of a list of shards are used in each epoch."""

    def __init__(self, shard_sizes: Sequence[int], seed: int) -> None:
        """Plan over shards of the given sizes.

        Args:
            shard_sizes: number of clips in each shard.
            seed: determines the order.

        Raises:
            ValueError: There are no clips.
        """
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.seed = seed
        self.num_clips = int(self.shard_sizes.sum())
        if self.num_clips == 0:
            raise ValueError("the clip store contains no clips to train on")

    def locate(self, positions: IntArray) -> dict[str, IntArray]:
        """Find the epoch, shard and row of samples.

        Args:
            positions: [n] int64, global positions q >= 0.

        Returns:
            `epoch`, `shard` and `row` (within the shard), each [n] int64.
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


class TrainPlan:
    """The order in which the clips of one or more datasets are used.

    Without `mix`, the datasets are concatenated: each clip is used once per epoch. With `mix`, each
    dataset has its own epochs, and every sum(mix) samples contain mix[i] samples of dataset i,
    evenly spread.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int]],
        seed: int,
        mix: Sequence[int] = (),
        hold_out: int = 0,
    ) -> None:
        """Plan over datasets.

        Args:
            shard_sizes: number of clips in each shard of each dataset.
            seed: determines the order.
            mix: relative number of samples from each dataset; empty concatenates the datasets.
            hold_out: number of clips to leave out at the end of the first dataset.

        Raises:
            ValueError: There are no clips.
        """
        sizes = [list(one) for one in shard_sizes]
        sizes[0] = without_last(sizes[0], hold_out)
        self.seed = seed
        self.num_clips = sum(map(sum, sizes))
        self._first_shard = np.cumsum([0] + [len(one) for one in sizes])
        if mix:
            seeds = [
                int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
                for number in range(len(sizes))
            ]
            self._plans = [SamplePlan(*one) for one in zip(sizes, seeds, strict=True)]
            self._turns = _take_turns(mix)
        else:
            self._plans = [SamplePlan([size for one in sizes for size in one], seed)]
            self._turns = np.zeros(1, dtype=np.int64)

    def locate(self, positions: IntArray) -> dict[str, IntArray]:
        """Find the epoch, dataset, shard and row of samples.

        Args:
            positions: [n] int64, global positions q >= 0.

        Returns:
            `epoch`, `shard` (index among the shards of all datasets), `source` (index of the
            dataset), `own_shard` (index within the dataset) and `row` (within the shard), each [n]
            int64.
        """
        positions = np.asarray(positions, dtype=np.int64)
        rounds, turns = np.divmod(positions, len(self._turns))
        whose = self._turns[turns]
        epoch, shard, row = (np.empty_like(positions) for _ in range(3))
        for number, plan in enumerate(self._plans):
            mine = np.flatnonzero(whose == number)
            earlier = np.cumsum(self._turns == number)[turns[mine]] - 1
            found = plan.locate(rounds[mine] * int((self._turns == number).sum()) + earlier)
            first = self._first_shard[number] if len(self._plans) > 1 else 0
            epoch[mine], shard[mine], row[mine] = (
                found["epoch"],
                found["shard"] + first,
                found["row"],
            )
        source = np.searchsorted(self._first_shard, shard, side="right") - 1
        return {
            "epoch": epoch,
            "shard": shard,
            "source": source,
            "own_shard": shard - self._first_shard[source],
            "row": row,
        }


def without_last(sizes: Sequence[int], count: int) -> list[int]:
    """Return the sizes of shards after removing their last `count` clips."""
    left = []
    for size in reversed(sizes):
        taken = min(size, count)
        count -= taken
        left.append(size - taken)
    return left[::-1]


def _take_turns(mix: Sequence[int]) -> IntArray:
    """Return dataset indices in which i occurs mix[i] times, evenly spread."""
    moments = [
        ((2 * turn + 1) / (2 * share), n) for n, share in enumerate(mix) for turn in range(share)
    ]
    return np.array([number for _, number in sorted(moments)], dtype=np.int64)
