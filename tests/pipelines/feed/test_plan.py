"""The sampling plan: every clip once per epoch, in an order that depends on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.feed.plan import SamplePlan

SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 0)


def located(plan: SamplePlan, start: int, stop: int) -> list[tuple[int, int, int]]:
    found = plan.locate(np.arange(start, stop))
    return list(zip(*(found[name].tolist() for name in ("epoch", "shard", "row")), strict=True))


@given(SIZES, st.integers(0, 2**32 - 1))
def test_every_clip_is_used_exactly_once_per_epoch(sizes: list[int], seed: int) -> None:
    plan = SamplePlan(sizes, seed)
    clips = {(shard, row) for shard, size in enumerate(sizes) for row in range(size)}
    for epoch in range(3):
        used = located(plan, epoch * plan.num_clips, (epoch + 1) * plan.num_clips)
        assert {epoch_of for epoch_of, _, _ in used} == {epoch}
        assert len(used) == plan.num_clips
        assert {(shard, row) for _, shard, row in used} == clips


@given(SIZES, st.integers(0, 30), st.integers(1, 30))
def test_a_sample_does_not_depend_on_what_it_is_asked_with(
    sizes: list[int], start: int, count: int
) -> None:
    plan = SamplePlan(sizes, seed=3)
    together = located(plan, start, start + count)
    alone = [located(SamplePlan(sizes, seed=3), p, p + 1)[0] for p in range(start, start + count)]
    assert together == alone


def test_epochs_and_seeds_differ_in_order() -> None:
    plan = SamplePlan([50, 50], seed=0)
    first, second = located(plan, 0, 100), located(plan, 100, 200)
    assert [place[1:] for place in first] != [place[1:] for place in second]
    assert first != located(SamplePlan([50, 50], seed=1), 0, 100)


def test_a_shard_is_read_in_one_go() -> None:
    shards = [shard for _, shard, _ in located(SamplePlan([5, 7, 6], seed=0), 0, 18)]
    changes = sum(a != b for a, b in zip(shards, shards[1:], strict=False))
    assert changes == 2


def test_no_clips_is_an_error() -> None:
    with pytest.raises(ValueError, match="no clips"):
        SamplePlan([0, 0], seed=0)
