"""Finds clips whose stored frames look like those of an earlier clip, by their perceptual hashes.

Frames are compared in order: the first of a clip with the first of another, and so on. Two clips
are near duplicates if the hashes of at least three quarters of their frames differ in at most a
given number of bits. Frames that show nothing in both clips do not count, and one that shows
nothing in only one of them counts as different. Of the clips in a fixed order, one leaves if it is
a near duplicate of an earlier clip that stays, so the result does not depend on anything else.

Not all pairs are compared. At most a quarter of a clip's frames may differ, so of any few more than
a quarter of its frames, one is near the frame at the same place of each of its near duplicates.
Only these frames are listed for the search (`stgt.retrieval.near_duplicates`): those whose hashes
are the rarest, since a title card that many clips share leads to many pairs. The result is exact.

Legend: N clips, F frames, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.frame_hashes import NO_HASH
from stgt.retrieval.near_duplicates import NearDuplicates

LISTED_AT_A_TIME = 200_000
"""Number of frames that are listed at a time; each takes approximately 1 KB."""
LOOKED_UP_AT_A_TIME = 100_000
STAYS = -1

Hashes = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]


def near_duplicates_of(hashes: Hashes, most_bits: int) -> IntArray:
    """Return for each clip the earlier clip that it is a near duplicate of.

    Args:
        hashes: [N, F] uint64, hashes of the frames of each clip, in the order of the clips. Rows
            are filled up with `NO_HASH`, and those of clips to ignore consist of it.
        most_bits: Largest number of differing bits, from 0 to 7.

    Returns:
        [N] int64: the first near duplicate that stays, or -1 if the clip itself stays.
    """
    found = np.full(len(hashes), STAYS, dtype=np.int64)
    shown = np.flatnonzero((hashes != NO_HASH).any(axis=1))
    if not len(shown):
        return found
    # Clips with equal hashes have the same near duplicates, so only the first of them is compared.
    _, first, group = np.unique(hashes[shown], axis=0, return_index=True, return_inverse=True)
    different = shown[np.sort(first)]
    # A clip that has left takes no other clip with it.
    for early, late in _pairs(hashes[different], most_bits).tolist():
        a, b = different[early], different[late]
        if found[a] == STAYS and found[b] == STAYS:
            found[b] = a
    same = shown[first[group.reshape(-1)]]
    again = same != shown
    found[shown[again]] = np.where(found[same] == STAYS, same, found[same])[again]
    return found


def _pairs(hashes: Hashes, most_bits: int) -> IntArray:
    """Return all pairs [P, 2] of near duplicates, the earlier clip first, sorted by the later one.

    Args:
        hashes: [N, F] uint64; every row has a frame that shows something.
        most_bits: Largest number of differing bits.
    """
    listed = _rarest(hashes)
    found = [np.empty((0, 2), dtype=np.int64)]
    for frame in range(hashes.shape[1]):
        column = hashes[:, frame]
        shown = np.flatnonzero(column != NO_HASH)
        for some in _pieces(np.flatnonzero(listed[:, frame]), LISTED_AT_A_TIME):
            search = NearDuplicates(column[some], most_bits)
            for others in _pieces(shown, LOOKED_UP_AT_A_TIME):
                left, right = search.find(column[others])
                pairs = np.sort(np.stack([some[left], others[right]], axis=1), axis=1)
                pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
                found.append(pairs[_are_near(hashes, pairs, most_bits)])
    pairs = np.unique(np.concatenate(found), axis=0)
    return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]


def _rarest(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Return [N, F] bool: the frames of each clip that are listed.

    They are the rarest ones that show something, one more than may differ.
    """
    shown = hashes != NO_HASH
    counts = np.empty(hashes.shape, dtype=np.int64)
    for frame in range(hashes.shape[1]):
        _, place, number = np.unique(hashes[:, frame], return_inverse=True, return_counts=True)
        counts[:, frame] = number[place.reshape(-1)]
    counts[~shown] = np.iinfo(np.int64).max
    rank = np.argsort(np.argsort(counts, axis=1, kind="stable"), axis=1, kind="stable")
    return shown & (rank <= (shown.sum(axis=1) // 4)[:, None])


def _are_near(hashes: Hashes, pairs: IntArray, most_bits: int) -> npt.NDArray[np.bool_]:
    """Return [P] bool: whether pairs of clips are near duplicates."""
    left, right = hashes[pairs[:, 0]], hashes[pairs[:, 1]]
    both = (left != NO_HASH) & (right != NO_HASH)
    near = both & (np.bitwise_count(left ^ right) <= most_bits)
    either = (left != NO_HASH) | (right != NO_HASH)
    return 4 * near.sum(axis=1) >= 3 * either.sum(axis=1)


def _pieces(rows: IntArray, size: int) -> Iterator[IntArray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
