"""Determines which caption of which clip is at which position of a training run.

The order is a pure function of the seed. An epoch uses every caption of every clip once. It
consists of passes over the clips: pass j uses one caption of each clip that has more than j
captions, so no clip repeats within a pass. In every pass, shards are permuted, and clips are
permuted within each shard, so a data worker reads each shard once per pass. Positions continue
across epochs: position q is sample q % N of epoch q // N, where N is the number of captions, and
step g of a run takes positions [g * global_batch, (g + 1) * global_batch). The samples are the same
for any number of workers, and resuming requires only the step.

If an epoch counts clips instead, it has only the first pass, and its captions are drawn at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stgt.errors import SettingError

IntArray = npt.NDArray[np.int64]
ShardCounts = Sequence[int]
"""Counts of a shard: entry j is its number of clips with more than j captions."""

LATER_PASS = 2**32 - 1
"""Precedes the number of a pass in the key of its permutations, except for the first pass. Shard
numbers are smaller, so no key is used twice."""


@lru_cache(maxsize=64)
def _permutation(size: int, *key: int) -> IntArray:
    order = np.random.default_rng(key).permutation(size)
    order.setflags(write=False)
    return order


class SamplePlan:
    """The order in which the captions of the clips of a list of shards are used in each epoch."""

    def __init__(self, shard_counts: Sequence[ShardCounts], seed: int) -> None:
        """Plan over shards.

        Args:
            shard_counts: For each shard, the number of its clips that have more than j captions,
                for j = 0, 1, ... One number per shard plans epochs of clips.
            seed: Determines the order.

        Raises:
            SettingError: There are no clips.
        """
        self.seed = seed
        lengths = np.array([len(counts) for counts in shard_counts], dtype=np.int64)
        self.num_passes = max(1, int(lengths.max(initial=0)))
        flat = np.array([count for counts in shard_counts for count in counts], dtype=np.int64)
        shard_of = np.repeat(np.arange(len(lengths)), lengths)
        pass_of = np.arange(len(flat)) - np.repeat(lengths.cumsum() - lengths, lengths)
        by_pass = np.argsort(pass_of, kind="stable")
        ends = np.searchsorted(pass_of[by_pass], np.arange(self.num_passes + 1))
        self._members: list[IntArray] = []
        """Shards of each pass."""
        self._counts: list[IntArray] = []
        """Number of clips that each of these shards has in the pass."""
        for begin, end in zip(ends[:-1], ends[1:], strict=True):
            chosen = by_pass[begin:end]
            self._members.append(shard_of[chosen])
            self._counts.append(flat[chosen])
        self._ends = np.cumsum([counts.sum() for counts in self._counts])
        self.num_samples = int(self._ends[-1])
        """Samples per epoch."""
        self.num_clips = int(self._counts[0].sum())
        if self.num_clips == 0:
            raise SettingError("the data contains no clips with captions to train on")

    def locate(self, positions: IntArray) -> dict[str, IntArray]:
        """Find epoch, pass, shard and clip of samples.

        Args:
            positions: [n] int64, global positions q >= 0.

        Returns:
            `epoch`, `number` (of the pass, from 0), `shard`, and `index` (of the clip among those
            clips of the shard that have more than `number` captions, in the order of rows), each
            [n] int64.
        """
        positions = np.asarray(positions, dtype=np.int64)
        epochs, samples = np.divmod(positions, self.num_samples)
        numbers = np.searchsorted(self._ends, samples, side="right")
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for epoch, number in np.unique(np.stack([epochs, numbers]), axis=1).T.tolist():
            chosen = np.flatnonzero((epochs == epoch) & (numbers == number))
            begin = int(self._ends[number - 1]) if number else 0
            found = self._locate_in_pass(epoch, number, samples[chosen] - begin)
            shards[chosen], indices[chosen] = found
        return {"epoch": epochs, "number": numbers, "shard": shards, "index": indices}

    def _locate_in_pass(
        self, epoch: int, number: int, samples: IntArray
    ) -> tuple[IntArray, IntArray]:
        key = (self.seed, epoch) if number == 0 else (self.seed, epoch, LATER_PASS, number)
        members, counts = self._members[number], self._counts[number]
        order = _permutation(len(members), *key)
        ends = counts[order].cumsum()
        place = np.searchsorted(ends, samples, side="right")
        slots = order[place]
        offset = samples - (ends[place] - counts[slots])
        indices = np.empty_like(samples)
        for slot in np.unique(slots).tolist():
            inside = slots == slot
            permuted = _permutation(int(counts[slot]), *key, int(members[slot]))
            indices[inside] = permuted[offset[inside]]
        return members[slots], indices


class TrainPlan:
    """The order in which the captions of the clips of one or more datasets are used.

    Without `mix`, the datasets are concatenated: each caption is used once per epoch. With `mix`,
    each dataset has its own epochs, and every sum(mix) samples contain mix[i] samples of dataset i,
    evenly spread.
    """

    def __init__(
        self,
        shard_counts: Sequence[Sequence[ShardCounts]],
        seed: int,
        mix: Sequence[int] = (),
    ) -> None:
        """Plan over datasets.

        Args:
            shard_counts: For each dataset and shard, the number of clips that have more than j
                captions, for j = 0, 1, ... One number per shard plans epochs of clips.
            seed: Determines the order.
            mix: Relative number of samples from each dataset; empty concatenates the datasets.

        Raises:
            SettingError: There are no clips.
        """
        self.seed = seed
        self.mix = tuple(mix)
        self._first_shard = np.cumsum([0] + [len(one) for one in shard_counts])
        if mix:
            seeds = [
                int(np.random.SeedSequence((seed, number)).generate_state(1)[0])
                for number in range(len(shard_counts))
            ]
            self._plans = [SamplePlan(*one) for one in zip(shard_counts, seeds, strict=True)]
            self._turns = _take_turns(mix)
        else:
            self._plans = [SamplePlan([counts for one in shard_counts for counts in one], seed)]
            self._turns = np.zeros(1, dtype=np.int64)
        self.clips_per_dataset = [
            sum(counts[0] for counts in one if len(counts)) for one in shard_counts
        ]
        self.num_clips = sum(self.clips_per_dataset)
        self.num_samples = sum(plan.num_samples for plan in self._plans)
        """Samples per epoch: captions, or clips if epochs count clips."""

    def locate(self, positions: IntArray) -> dict[str, IntArray]:
        """Find epoch, pass, dataset, shard and clip of samples.

        Args:
            positions: [n] int64, global positions q >= 0.

        Returns:
            `epoch`, `number` (of the pass), `shard` (index among the shards of all datasets),
            `source` (index of the dataset), `own_shard` (index within the dataset) and `index` (of
            the clip among those clips of the shard that have more than `number` captions), each [n]
            int64.
        """
        positions = np.asarray(positions, dtype=np.int64)
        rounds, turns = np.divmod(positions, len(self._turns))
        whose = self._turns[turns]
        names = ("epoch", "number", "shard", "index")
        located = {name: np.empty_like(positions) for name in names}
        for number, plan in enumerate(self._plans):
            mine = np.flatnonzero(whose == number)
            earlier = np.cumsum(self._turns == number)[turns[mine]] - 1
            found = plan.locate(rounds[mine] * int((self._turns == number).sum()) + earlier)
            if len(self._plans) > 1:
                found["shard"] = found["shard"] + self._first_shard[number]
            for name in names:
                located[name][mine] = found[name]
        source = np.searchsorted(self._first_shard, located["shard"], side="right") - 1
        own_shard = located["shard"] - self._first_shard[source]
        return {**located, "source": source, "own_shard": own_shard}


def _take_turns(mix: Sequence[int]) -> IntArray:
    """Return dataset indices in which i occurs mix[i] times, evenly spread."""
    moments = [
        ((2 * turn + 1) / (2 * share), n) for n, share in enumerate(mix) for turn in range(share)
    ]
    return np.array([number for _, number in sorted(moments)], dtype=np.int64)
