"""Finds clips whose stored frames look like those of an earlier clip, by their perceptual hashes.

Frames are compared in order: the first of a clip with the first of another, and so on. Two clips
are near duplicates if the hashes of at least three quarters of their frames differ in at most a
given number of bits. Frames that show nothing in both clips do not count, and one that shows
nothing in only one of them counts as different. Of the clips in a fixed order, one leaves if it is
a near duplicate of an earlier clip that stays, so the result does not depend on anything else.

The first half of the clips is searched first, then those of its clips that stay are compared with
the second half, and what remains of the second half is searched last; each half likewise. A clip
that leaves is therefore compared no further, so that many clips that look alike, such as pieces of
the footage of one fixed camera, take no more time than others. Few clips are compared directly.

Otherwise, not all pairs are compared. At most a quarter of a clip's frames may differ, so of any
few more than a quarter of its frames, one is near the frame at the same place of each of its near
duplicates. Only these frames are listed for the search (`stgt.retrieval.near_duplicates`): those
whose hashes resemble the fewest others, since a title card that many clips share leads to many
pairs. The result is exact.

Legend: N clips, F frames, P pairs, E earlier clips, L later clips.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.frame_hashes import NO_HASH
from stgt.retrieval.near_duplicates import PART_BITS, PARTS, NearDuplicates

COMPARED_DIRECTLY = 512
"""Number of clips of which all pairs are compared."""
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
    owners = _Search(hashes[different], most_bits).owners()
    gone = owners != STAYS
    found[different[gone]] = different[owners[gone]]
    same = shown[first[group.reshape(-1)]]
    again = same != shown
    found[shown[again]] = np.where(found[same] == STAYS, same, found[same])[again]
    return found


class _Search:
    """The search among clips every one of which has a frame that shows something."""

    def __init__(self, hashes: Hashes, most_bits: int) -> None:
        self._hashes = hashes
        self._most_bits = most_bits
        self._listed = _most_different(hashes)
        self._owners = np.full(len(hashes), STAYS, dtype=np.int64)

    def owners(self) -> IntArray:
        """Return [N] int64: the first near duplicate that stays, or -1 if the clip itself stays."""
        self._resolve(np.arange(len(self._hashes)))
        return self._owners

    def _resolve(self, clips: IntArray) -> None:
        """Find the owners of some clips, in ascending order, that no clip before them has."""
        if len(clips) <= COMPARED_DIRECTLY:
            while len(clips):
                owner, clips = clips[0], clips[1:]
                near = _are_near(self._hashes[owner], self._hashes[clips], self._most_bits)
                self._owners[clips[near]] = owner
                clips = clips[~near]
            return
        early, late = np.split(clips, [len(clips) // 2])
        self._resolve(early)
        for some in _pieces(self._staying(early), LISTED_AT_A_TIME):
            self._owners[late] = self._first_near(some, late)
            late = self._staying(late)
        self._resolve(late)

    def _staying(self, clips: IntArray) -> IntArray:
        return clips[self._owners[clips] == STAYS]

    def _first_near(self, early: IntArray, late: IntArray) -> IntArray:
        """Return [L] int64: the first of [E] earlier clips that each is near, or -1."""
        none = len(self._hashes)
        found = np.full(len(late), none, dtype=np.int64)
        for frame in range(self._hashes.shape[1]):
            column = self._hashes[:, frame]
            listed = early[self._listed[early, frame]]
            shown = np.flatnonzero(column[late] != NO_HASH)
            if not len(listed) or not len(shown):
                continue
            search = NearDuplicates(column[listed], self._most_bits)
            for some in _pieces(shown, LOOKED_UP_AT_A_TIME):
                for left, right in search.pairs(column[late[some]]):
                    owners, places = listed[left], some[right]
                    better = owners < found[places]
                    owners, places = owners[better], places[better]
                    near = _are_near(
                        self._hashes[owners], self._hashes[late[places]], self._most_bits
                    )
                    np.minimum.at(found, places[near], owners[near])
        return np.where(found == none, STAYS, found)


def _most_different(hashes: Hashes) -> npt.NDArray[np.bool_]:
    """Return [N, F] bool: the frames of each clip that are listed.

    They are those that show something and resemble the fewest others at their place, one more than
    may differ. How many they resemble is estimated by the hashes with an equal part.
    """
    shown = hashes != NO_HASH
    counts = np.zeros(hashes.shape, dtype=np.int64)
    for frame in range(hashes.shape[1]):
        for part in range(PARTS):
            keys = (hashes[:, frame] >> np.uint64(part * PART_BITS)).astype(np.uint16)
            counts[:, frame] += np.bincount(keys, minlength=1 << PART_BITS)[keys]
    counts[~shown] = np.iinfo(np.int64).max
    rank = np.argsort(np.argsort(counts, axis=1, kind="stable"), axis=1, kind="stable")
    return shown & (rank <= (shown.sum(axis=1) // 4)[:, None])


def _are_near(left: Hashes, right: Hashes, most_bits: int) -> npt.NDArray[np.bool_]:
    """Return [P] bool: whether pairs of clips, with hashes [P, F] or [F], are near duplicates."""
    both = (left != NO_HASH) & (right != NO_HASH)
    near = both & (np.bitwise_count(left ^ right) <= most_bits)
    either = (left != NO_HASH) | (right != NO_HASH)
    return 4 * near.sum(axis=-1) >= 3 * either.sum(axis=-1)


def _pieces(rows: IntArray, size: int) -> Iterator[IntArray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
