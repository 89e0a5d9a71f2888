"""Ranks, recall at K, median and mean rank, in plain numpy.

Ties are pessimistic: an item that scores the same as the right one counts as ahead of it, so a
model that scores everything alike gets no credit. Unscored items (-inf) rank behind every scored
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

RECALL_AT = (1, 5, 10)


def best_ranks(
    scores: npt.NDArray[np.floating], right: Sequence[Sequence[int]]
) -> npt.NDArray[np.int64]:
    """Rank of the best-placed right item of each row, 1 = first.

    Args:
        scores: [rows, columns] float, higher is better, -inf = not scored.
        right: for each row, the columns that are right answers (at least one).

    Returns:
        [rows] int64. Other right answers do not push the best one down.

    Raises:
        ValueError: a row has no right answer, a score is NaN, or the lengths differ.
    """
    if len(right) != len(scores):
        raise ValueError(f"right: {len(right)} rows for {len(scores)} rows of scores")
    if np.isnan(scores).any():
        rows = np.flatnonzero(np.isnan(scores).any(axis=1))[:5].tolist()
        raise ValueError(f"scores: NaN in rows {rows}")
    ranks = np.empty(len(scores), dtype=np.int64)
    for row, columns in enumerate(right):
        if len(columns) == 0:
            raise ValueError(f"right: row {row} has no right answer")
        is_right = np.zeros(scores.shape[1], dtype=bool)
        is_right[list(columns)] = True
        best = scores[row, is_right].max()
        ranks[row] = 1 + int((scores[row, ~is_right] >= best).sum())
    return ranks


def retrieval_metrics(ranks: npt.NDArray[np.int64], direction: str) -> dict[str, float]:
    """R1, R5, R10 and their mean in per cent, median and mean rank.

    Args:
        ranks: [rows] int64, 1 = first.
        direction: "t2v" or "v2t", the prefix of the metric names.
    """
    return by_name(direction, *_figures(ranks))


def _figures(ranks: npt.NDArray[np.int64]) -> tuple[list[float], float, float]:
    recalls = [float(np.mean(ranks <= k) * 100) for k in RECALL_AT]
    return recalls, float(np.median(ranks)), float(np.mean(ranks))


def by_name(direction: str, recalls: Sequence[Any], median: Any, mean: Any) -> dict[str, Any]:
    """Figures of one direction under the names that they are reported by.

    Args:
        direction: "t2v" or "v2t".
        recalls: at each of `RECALL_AT`, in per cent; numbers, or arrays of many resamples.
        median: rank.
        mean: rank.
    """
    found = {f"{direction}/R{k}": recall for k, recall in zip(RECALL_AT, recalls, strict=True)}
    found[f"{direction}/Rmean"] = sum(recalls) / len(recalls)
    found[f"{direction}/MdR"] = median
    found[f"{direction}/MnR"] = mean
    return found


def is_better(name: str, difference: float) -> bool:
    """Whether a metric that changed by `difference` got better: recalls up, ranks down."""
    return difference > 0 if name.rpartition("/")[2].startswith("R") else difference < 0
