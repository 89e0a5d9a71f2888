"""Validation clips that are held out of training: whole videos, by a hash of the video id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipelines.artifacts.manifest import clip_hash
from pipelines.feed.held_out import HeldOut, hold_out_last, hold_out_videos, read_held_out


class Spans:
    """A dataset with three spans per video, spread over shards."""

    def __init__(self, videos: int, shards: int) -> None:
        names = [f"video{number}" for number in range(videos) for _ in range(3)]
        order = np.random.default_rng(0).permutation(len(names))
        self._shards = [
            [(names[place], f"/v/{names[place]}.mp4") for place in part]
            for part in np.array_split(order, shards)
        ]
        self.shard_sizes = [len(shard) for shard in self._shards]

    def videos(self, shard: int) -> list[tuple[str, str]]:
        return self._shards[shard]


def test_whole_videos_are_held_out_in_the_order_of_their_hash() -> None:
    data = Spans(40, shards=5)
    held_out = hold_out_videos(data, 10)
    by_hash = sorted((f"video{number}" for number in range(40)), key=clip_hash)
    assert list(held_out.videos) == by_hash[:4]  # of three clips each: the first to reach ten
    assert held_out.num_clips == 12
    out = {data.videos(shard)[row][0] for shard, row in held_out.places()}
    assert out == set(held_out.videos)
    others = [
        data.videos(shard)[row][0]
        for shard, size in enumerate(data.shard_sizes)
        for row in set(range(size)) - set(held_out.rows.get(shard, np.empty(0)).tolist())
    ]
    assert not out & set(others)
    assert len(others) == 120 - 12


def test_more_clips_than_there_are_hold_out_all() -> None:
    assert hold_out_videos(Spans(4, shards=2), 100).num_clips == 12
    assert hold_out_videos(Spans(4, shards=2), 0).num_clips == 0


def test_the_list_is_read_back_for_the_same_clips_only(tmp_path: Path) -> None:
    uri = str(tmp_path / "held_out.json")
    held_out = hold_out_videos(Spans(40, shards=5), 10)
    held_out.write(uri, "digest", 10)
    found = read_held_out(uri, "digest", 10)
    assert found is not None
    assert (found.places(), found.videos) == (held_out.places(), held_out.videos)
    assert read_held_out(uri, "other", 10) is None
    assert read_held_out(uri, "digest", 11) is None


def test_earlier_runs_hold_out_the_last_clips() -> None:
    held_out = hold_out_last([5, 0, 4, 2], 4)
    assert held_out.places() == [(2, 2), (2, 3), (3, 0), (3, 1)]
    assert hold_out_last([2], 0).places() == HeldOut().places() == []


@pytest.mark.parametrize("clips", [1, 3, 4])
def test_at_least_so_many_clips(clips: int) -> None:
    assert hold_out_videos(Spans(9, shards=2), clips).num_clips == -(-clips // 3) * 3
