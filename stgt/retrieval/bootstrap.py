"""How far retrieval metrics would vary with other test clips: the bootstrap (Efron 1979).

Videos are drawn, not captions: captions of one video succeed and fail together, and drawing each by
itself would give intervals that are too narrow.

Legend: B resamples, G videos, R rows that search (captions or videos).
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
"""Percentiles that enclose 95 % of the resamples."""
AT_A_TIME = 50
"""Resamples computed at a time, which bounds memory to this many weights of R rows."""


def _weights(num_groups: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """How often each video was drawn, [at most AT_A_TIME, G] each."""
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
    """The metrics of one direction in each resample.

    With the same seed and videos the resamples are the same ones: two systems can be compared pair
    by pair.

    Args:
        ranks: [R] int64.
        groups: [R] int64, video of each row.
        num_groups: G.
        direction: "t2v" or "v2t".
        resamples: B.
        seed: of the draws.

    Returns:
        [B] float64 each, under the names of `retrieval_metrics`.
    """
    order = np.argsort(ranks, kind="stable")
    ordered = ranks[order].astype(np.float64)
    values: list[FloatArray] = []
    for weights in _weights(num_groups, resamples, seed):
        by_row = weights[:, groups[order]]
        reached = np.cumsum(by_row, axis=1)
        total = reached[:, -1]
        # A resample may hold none of the few videos that have rows.
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
    """The rank at a place [B] of each resample's sorted list."""
    first = (reached <= np.nan_to_num(place)[:, None]).sum(axis=1)
    return ordered[np.minimum(first, len(ordered) - 1)]


def interval(values: FloatArray) -> tuple[float, float]:
    """The 95 % interval of a metric's resamples."""
    low, high = np.nanpercentile(values, [LOW, HIGH])
    return float(low), float(high)
