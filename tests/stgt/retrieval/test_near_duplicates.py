"""Hashes that differ in few bits are found as by comparing all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from stgt.retrieval import near_duplicates
from stgt.retrieval.near_duplicates import MOST_BITS, NearDuplicates


def random_hashes(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, size=count, dtype=np.uint64)


def flipped(hashes: np.ndarray, seed: int) -> np.ndarray:
    """The hashes with 0 to 12 random bits changed."""
    generator = np.random.default_rng(seed)
    changed = hashes.copy()
    for place in range(len(changed)):
        for bit in generator.choice(64, size=generator.integers(0, 13), replace=False):
            changed[place] ^= np.uint64(1) << np.uint64(bit)
    return changed


@pytest.mark.parametrize("most_bits", [0, 3, 6, MOST_BITS])
@pytest.mark.parametrize("pairs_at_a_time", [3, 2_000_000])
def test_pairs_are_those_of_brute_force(
    monkeypatch: pytest.MonkeyPatch, most_bits: int, pairs_at_a_time: int
) -> None:
    monkeypatch.setattr(near_duplicates, "PAIRS_AT_A_TIME", pairs_at_a_time)
    wanted = random_hashes(60, 0)
    wanted[7] = wanted[3]  # two test frames that look the same
    hashes = np.concatenate([random_hashes(40, 1), flipped(wanted, 2), flipped(wanted, 3)])
    distances = np.bitwise_count(wanted[:, None] ^ hashes[None, :])
    expected = np.argwhere(distances <= most_bits)
    rows, columns = NearDuplicates(wanted, most_bits).find(hashes)
    np.testing.assert_array_equal(np.stack([rows, columns], axis=1), expected)
    assert len(expected) > 5


def test_nothing_is_found_in_nothing() -> None:
    nothing = np.empty(0, dtype=np.uint64)
    for wanted, hashes in ((nothing, random_hashes(3, 0)), (random_hashes(3, 0), nothing)):
        rows, columns = NearDuplicates(wanted, 6).find(hashes)
        assert len(rows) == len(columns) == 0


def test_distances_for_which_the_search_is_not_exact_are_refused() -> None:
    with pytest.raises(ValueError, match="most_bits = 8"):
        NearDuplicates(random_hashes(3, 0), 8)
