"""Near duplicates by the hashes of frames, compared with a search of all pairs."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from pipelines.ingest.near_duplicates import near_duplicates_of

FRAMES = 8


def by_brute_force(hashes: np.ndarray, most_bits: int) -> list[int]:
    """The first earlier clip that stays and has three quarters of a clip's frames; else -1."""
    found: list[int] = []
    for number, own in enumerate(hashes.tolist()):
        near = -1
        for other in range(number):
            theirs = hashes[other].tolist()
            pairs = [(a, b) for a, b in zip(own, theirs, strict=True) if a or b]
            same = [a and b and (a ^ b).bit_count() <= most_bits for a, b in pairs]
            if found[other] == -1 and pairs and sum(map(bool, same)) >= 0.75 * len(pairs):
                near = other
                break
        found.append(near)
    return found


def flipped(random: np.random.Generator, value: int, bits: int) -> int:
    for place in random.choice(64, bits, replace=False).tolist():
        value ^= 1 << place
    return value


def clusters(random: np.random.Generator, clips: int) -> np.ndarray:
    """Clips near one another in chains: variants of few clips, with frames that show nothing."""
    rows = [random.integers(1, 2**63, FRAMES).tolist() for _ in range(6)]
    while len(rows) < clips:
        row = list(rows[random.integers(len(rows))])
        for frame in range(FRAMES):
            change = random.integers(10)
            if change < 3:
                row[frame] = flipped(random, row[frame], int(random.integers(1, 9)))
            elif change == 3:
                row[frame] = 0
            elif change == 4:
                row[frame] = rows[0][frame]  # a picture that many clips show
        rows.append(row)
    return random.permutation(np.array(rows, dtype=np.uint64))


@pytest.mark.slow
@pytest.mark.parametrize("most_bits", [0, 3, 6, 7])
def test_all_near_duplicates_are_found_and_no_others(
    most_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ingest.near_duplicates.COMPARED_DIRECTLY", 3)
    monkeypatch.setattr("pipelines.ingest.near_duplicates.LISTED_AT_A_TIME", 17)
    monkeypatch.setattr("pipelines.ingest.near_duplicates.LOOKED_UP_AT_A_TIME", 23)
    leaving = 0
    for seed in range(6):
        hashes = clusters(np.random.default_rng(seed), 90)
        expected = by_brute_force(hashes, most_bits)
        assert near_duplicates_of(hashes, most_bits).tolist() == expected
        leaving += sum(one != -1 for one in expected)
    assert leaving > 20


def test_pieces_of_one_camera_take_little_memory() -> None:
    random = np.random.default_rng(0)
    clips, frames = 2000, 4
    camera = np.tile(random.integers(1, 2**63, frames, dtype=np.uint64), (clips, 1))
    for _ in range(2):  # at most 4 bits between any two clips
        camera ^= np.uint64(1) << random.integers(0, 64, (clips, frames), dtype=np.uint64)
    assert len(np.unique(camera, axis=0)) == clips
    others = random.integers(1, 2**63, (3, frames), dtype=np.uint64)
    hashes = np.concatenate([others[:2], camera, others[2:]])
    tracemalloc.start()
    found = near_duplicates_of(hashes, 6)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tolist() == [-1, -1, -1, *[2] * (clips - 1), -1]
    assert peak_bytes < 8e6  # all pairs would be 32 MB, and those that share a part four times that


def test_a_clip_that_leaves_takes_no_other_with_it() -> None:
    first = np.full((1, FRAMES), 0b1111, dtype=np.uint64)
    chain = np.concatenate([first, first ^ np.uint64(0b11 << 8), first ^ np.uint64(0b1111 << 8)])
    assert near_duplicates_of(chain, 2).tolist() == [-1, 0, -1]
    assert near_duplicates_of(chain[1:], 2).tolist() == [-1, 0]


def test_clips_that_show_nothing_are_no_duplicates() -> None:
    hashes = np.zeros((3, FRAMES), dtype=np.uint64)
    assert near_duplicates_of(hashes, 7).tolist() == [-1, -1, -1]
    hashes[1:, 0] = 5  # a single frame that shows something
    assert near_duplicates_of(hashes, 0).tolist() == [-1, -1, 1]
    assert near_duplicates_of(hashes[:0], 0).tolist() == []


def test_a_quarter_of_the_frames_may_differ_and_no_more() -> None:
    random = np.random.default_rng(0)
    clip = random.integers(1, 2**63, FRAMES, dtype=np.uint64)
    others = random.integers(1, 2**63, FRAMES, dtype=np.uint64)
    two, three = clip.copy(), clip.copy()
    two[[0, 5]], three[[0, 3, 5]] = others[[0, 5]], others[[0, 3, 5]]
    assert near_duplicates_of(np.stack([clip, two, three]), 6).tolist() == [-1, 0, -1]
    black = clip.copy()
    black[:3] = 0  # shows nothing in one of the two clips
    assert near_duplicates_of(np.stack([clip, black]), 6).tolist() == [-1, -1]
    assert near_duplicates_of(np.stack([black, black]), 6).tolist() == [-1, 0]
