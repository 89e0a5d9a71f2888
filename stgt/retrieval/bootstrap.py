"""Bootstrap confidence intervals of retrieval metrics over test videos (Efron 1979).

Videos are resampled rather than captions: the results of one video's captions are correlated, and
resampling captions independently would give intervals that are too narrow.

Legend: B resamples, G videos, R rows of the searching side (captions or videos).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from stgt.retrieval.metrics import RECALL_AT, by_name

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

RESAMPLES = 1000
LOW, HIGH = 2.5, 97.5
"""Percentiles that bound the central 95 % of the resamples."""
AT_A_TIME = 50
"""Number of resamples computed at a time, which bounds memory to this many rows of R weights."""


def times_drawn(num_groups: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield how often each video is drawn, as chunks [at most AT_A_TIME, G]."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, AT_A_TIME):
        count = min(AT_A_TIME, resamples - start)
        drawn = [generator.integers(num_groups, size=num_groups) for _ in range(count)]
        yield np.stack([np.bincount(one, minlength=num_groups) for one in drawn]).astype(float)


def resampled(
    ranks: IntArray,
    groups: IntArray,
    num_groups: int,
    direction: str,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """Compute the metrics of one direction in each resample.

    The same seed and number of videos give the same resamples, so that two systems can be compared
    in pairs.

    Args:
        ranks: [R] int64.
        groups: [R] int64, video of each row.
        num_groups: G.
        direction: "t2v" or "v2t".
        resamples: B.
        seed: Seed for drawing videos.

    Returns:
        [B] float64 for each metric, named as in `retrieval_metrics`.
    """
    order = np.argsort(ranks, kind="stable")
    ordered = ranks[order].astype(np.float64)
    values: list[FloatArray] = []
    for weights in times_drawn(num_groups, resamples, seed):
        by_row = weights[:, groups[order]]
        reached = np.cumsum(by_row, axis=1)
        total = reached[:, -1]
        # A resample may contain no video that has rows.
        total = np.where(total == 0, np.nan, total)
        recalls = [
            100 * by_row[:, : np.searchsorted(ordered, k, side="right")].sum(axis=1) / total
            for k in RECALL_AT
        ]
        median = (_at(reached, ordered, (total - 1) // 2) + _at(reached, ordered, total // 2)) / 2
        values.append(np.stack([*recalls, median, by_row @ ordered / total]))
    recall1, recall5, recall10, median, mean = np.concatenate(values, axis=1)
    return by_name(direction, [recall1, recall5, recall10], median, mean)


def _at(reached: FloatArray, ordered: FloatArray, place: FloatArray) -> FloatArray:
    """Return the rank at position `place` [B] of each resample's sorted ranks."""
    first = (reached <= np.nan_to_num(place)[:, None]).sum(axis=1)
    return ordered[np.minimum(first, len(ordered) - 1)]


def interval(values: FloatArray) -> tuple[float, float]:
    """Return the 95 % interval of a metric's resamples."""
    low, high = np.nanpercentile(values, [LOW, HIGH])
    return float(low), float(high)
