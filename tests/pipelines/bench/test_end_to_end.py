"""The benchmark end_to_end: the stages and the script do the same work."""

from __future__ import annotations

import functools

import pytest

from jobs import entry
from pipelines.bench import end_to_end


@pytest.mark.slow
@pytest.mark.soak
def test_both_sides_reach_metrics() -> None:
    # Of 40 clips, one is damaged.
    size = end_to_end.Size(train_clips=104, val_clips=40, steps=4)
    rows = end_to_end.measure(1, functools.partial(entry.start_ray, 4), size)
    assert [row.name for row in rows] == ["end_to_end", "end_to_end/R@1"]
    seconds, recall = rows
    assert seconds.ours > 0
    assert seconds.baseline
    assert 0 <= recall.ours <= 100
