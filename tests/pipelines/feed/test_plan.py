"""The sampling plan: every caption once per epoch, in an order that depends on the seed alone."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.feed.plan import SamplePlan, TrainPlan

CAPTIONS = st.lists(st.lists(st.integers(0, 4), max_size=7), min_size=1, max_size=6).filter(
    lambda shards: any(any(shard) for shard in shards)
)
"""Number of captions of each clip of each shard."""


def counts(captions: list[list[int]]) -> list[list[int]]:
    """For each shard, the number of clips with more than j captions."""
    return [[sum(one > j for one in shard) for j in range(max([1, *shard]))] for shard in captions]


def located(plan: SamplePlan, start: int, stop: int) -> list[tuple[int, ...]]:
    found = plan.locate(np.arange(start, stop))
    names = ("epoch", "number", "shard", "index")
    return list(zip(*(found[name].tolist() for name in names), strict=True))


@given(CAPTIONS, st.integers(0, 2**32 - 1))
def test_every_caption_is_used_once_per_epoch_and_no_clip_repeats_in_a_pass(
    captions: list[list[int]], seed: int
) -> None:
    plan = SamplePlan(counts(captions), seed)
    assert plan.num_samples == sum(map(sum, captions))
    assert plan.num_clips == sum(one > 0 for shard in captions for one in shard)
    expected = {
        (number, shard, index)
        for shard, of_clips in enumerate(captions)
        for number in range(max([0, *of_clips]))
        for index in range(sum(one > number for one in of_clips))
    }
    for epoch in range(3):
        used = located(plan, epoch * plan.num_samples, (epoch + 1) * plan.num_samples)
        assert {of for of, *_ in used} == {epoch}
        assert len(used) == plan.num_samples
        assert {(number, shard, index) for _, number, shard, index in used} == expected
        passes = [number for _, number, *_ in used]
        assert passes == sorted(passes)


@given(CAPTIONS, st.integers(0, 30), st.integers(1, 30))
def test_a_sample_does_not_depend_on_what_it_is_asked_with(
    captions: list[list[int]], start: int, count: int
) -> None:
    plan = SamplePlan(counts(captions), seed=3)
    together = located(plan, start, start + count)
    again = SamplePlan(counts(captions), seed=3)
    assert together == [located(again, p, p + 1)[0] for p in range(start, start + count)]


def test_clips_with_one_caption_keep_the_order_of_epochs_of_clips() -> None:
    """The order of runs that began before epochs counted captions."""
    found = located(SamplePlan([[4], [3]], seed=7), 0, 14)
    assert [(shard, index) for _, _, shard, index in found] == [
        *[(0, 0), (0, 2), (0, 1), (0, 3), (1, 0), (1, 2), (1, 1)],
        *[(0, 2), (0, 0), (0, 3), (0, 1), (1, 2), (1, 0), (1, 1)],
    ]


def test_epochs_passes_and_seeds_differ_in_order() -> None:
    plan = SamplePlan([[50, 50], [50, 50]], seed=0)
    first, second = located(plan, 0, 100), located(plan, 100, 200)
    assert [place[2:] for place in first] != [place[2:] for place in second]
    assert first != located(plan, 200, 300)
    assert first != located(SamplePlan([[50, 50], [50, 50]], seed=1), 0, 100)


def test_a_shard_is_read_in_one_go() -> None:
    shards = [shard for _, _, shard, _ in located(SamplePlan([[5], [7], [6]], seed=0), 0, 18)]
    changes = sum(a != b for a, b in zip(shards, shards[1:], strict=False))
    assert changes == 2


def test_no_clips_is_an_error() -> None:
    with pytest.raises(ValueError, match="no clips"):
        SamplePlan([[0], [0]], seed=0)


def test_published_epochs_of_msrvtt_and_msvd() -> None:
    """9,000 videos with 20 captions each, and 48,774 captions in 12 epochs, in batches of 160."""
    msrvtt = TrainPlan([[[1000] * 20] * 9], seed=0)
    assert (msrvtt.num_samples, 9 * msrvtt.num_samples / 160) == (180_000, 10_125)
    assert msrvtt.num_clips == 9000


def test_ten_million_clips_are_planned_in_no_time() -> None:
    started = time.process_time()
    plan = TrainPlan([[[1024]] * 9766], seed=0)
    plan.locate(np.arange(9_000_000, 9_000_032))
    assert time.process_time() - started < 2
