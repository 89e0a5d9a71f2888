"""Finds pairs of 64-bit hashes that differ in few bits, without comparing all pairs.

Of hashes that differ in at most 7 bits, one of the four 16-bit parts differs in at most one bit.
Each part of the wanted hashes is therefore listed under its own value and the 16 values that
differ in one bit, and only hashes with such a part are compared (multi-index hashing, Norouzi et
al. 2012). The result is exact.

Legend: W wanted hashes, H hashes to look for, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

PARTS, PART_BITS = 4, 16
MOST_BITS = 7
"""Largest distance for which the search is exact."""
PAIRS_AT_A_TIME = 2_000_000
"""Number of pairs compared at a time, which bounds memory."""


class NearDuplicates:
    """Wanted hashes, for which hashes that differ in at most `most_bits` bits can be looked up."""

    def __init__(self, wanted: Hashes, most_bits: int) -> None:
        """Index the wanted hashes.

        Args:
            wanted: [W] uint64.
            most_bits: Largest number of differing bits, from 0 to 7.

        Raises:
            ValueError: `most_bits` is out of range.
        """
        if not 0 <= most_bits <= MOST_BITS:
            raise ValueError(f"most_bits = {most_bits}: must lie in [0, {MOST_BITS}]")
        self._wanted = np.asarray(wanted, dtype=np.uint64)
        self._most_bits = most_bits
        flips = np.concatenate([[0], 1 << np.arange(PART_BITS)]).astype(np.uint16)
        self._keys: list[npt.NDArray[np.uint16]] = []
        self._owners: list[IntArray] = []
        for part in range(PARTS):
            keys = (_part(self._wanted, part)[:, None] ^ flips[None, :]).ravel()
            order = np.argsort(keys, kind="stable")
            self._keys.append(keys[order])
            self._owners.append(order // len(flips))

    def find(self, hashes: Hashes) -> tuple[IntArray, IntArray]:
        """Return the pairs of a wanted hash and one of [H] uint64 that differ in few bits.

        Returns:
            Positions among the wanted hashes and among `hashes`, [P] int64 each, every pair once,
            in ascending order of both.
        """
        found = list(self.pairs(hashes))
        wanted, rows = (
            np.concatenate([np.empty(0, dtype=np.int64), *(some[side] for some in found)])
            for side in (0, 1)
        )
        order = np.lexsort((rows, wanted))
        return wanted[order], rows[order]

    def pairs(self, hashes: Hashes) -> Iterator[tuple[IntArray, IntArray]]:
        """Yield the pairs that `find` returns piece by piece, each pair once, in any order."""
        hashes = np.asarray(hashes, dtype=np.uint64)
        for part in range(PARTS):
            yield from self._pairs(part, hashes)

    def _pairs(self, part: int, hashes: Hashes) -> Iterator[tuple[IntArray, IntArray]]:
        """Yield pairs of hashes that are near, and whose first near part is this one."""
        keys = _part(hashes, part)
        first = np.searchsorted(self._keys[part], keys, side="left")
        counts = np.searchsorted(self._keys[part], keys, side="right") - first
        ends = np.cumsum(counts)
        start = 0
        while start < len(hashes):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + PAIRS_AT_A_TIME)))
            some = counts[start:stop]
            rows = np.repeat(np.arange(start, stop), some)
            # Position of each pair among the pairs of its row.
            offset = np.arange(len(rows)) - np.repeat(ends[start:stop] - some - before, some)
            wanted = self._owners[part][first[rows] + offset]
            differing = self._wanted[wanted] ^ hashes[rows]
            near = np.bitwise_count(differing) <= self._most_bits
            for earlier in range(part):
                near &= np.bitwise_count(_part(differing, earlier)) > 1
            yield wanted[near], rows[near]
            start = stop


def _part(hashes: Hashes, part: int) -> npt.NDArray[np.uint16]:
    # Arrays of 16-bit numbers are sorted and searched several times as fast as those of 64 bits.
    return (hashes >> np.uint64(part * PART_BITS)).astype(np.uint16)
