"""Ranks, recall at K, and median and mean rank, in plain numpy.

Ties are pessimistic: an item with the same score as the correct one ranks ahead of it, so a model
that scores all items alike gets no credit. Unscored items (-inf) rank behind all scored ones.
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
    """Return the rank of the best-ranked correct item of each row, 1 = first.

    Args:
        scores: [rows, columns] float, higher is better, -inf = not scored.
        right: For each row, the columns that are correct answers (at least one).

    Returns:
        [rows] int64. Other correct answers do not lower the rank of the best one.

    Raises:
        ValueError: A row has no correct answer, a score is NaN, or the lengths differ.
    """
    if len(right) != len(scores):
        raise ValueError(f"right: got {len(right)} rows for {len(scores)} rows of scores")
    if np.isnan(scores).any():
        rows = np.flatnonzero(np.isnan(scores).any(axis=1))[:5].tolist()
        raise ValueError(f"scores: NaN in rows {rows}")
    ranks = np.empty(len(scores), dtype=np.int64)
    for row, columns in enumerate(right):
        if len(columns) == 0:
            raise ValueError(f"right: row {row} has no correct answer")
        is_right = np.zeros(scores.shape[1], dtype=bool)
        is_right[list(columns)] = True
        best = scores[row, is_right].max()
        ranks[row] = 1 + int((scores[row, ~is_right] >= best).sum())
    return ranks


def retrieval_metrics(ranks: npt.NDArray[np.int64], direction: str) -> dict[str, float]:
    """Compute R1, R5, R10 and their mean, in percent, and the median and mean rank.

    Args:
        ranks: [rows] int64, 1 = first.
        direction: "t2v" or "v2t", the prefix of the metric names.
    """
    return by_name(direction, *_figures(ranks))


def _figures(ranks: npt.NDArray[np.int64]) -> tuple[list[float], float, float]:
    recalls = [float(np.mean(ranks <= k) * 100) for k in RECALL_AT]
    return recalls, float(np.median(ranks)), float(np.mean(ranks))


def by_name(direction: str, recalls: Sequence[Any], median: Any, mean: Any) -> dict[str, Any]:
    """Return the metrics of one direction by their reported names.

    Args:
        direction: "t2v" or "v2t".
        recalls: Recall at each of `RECALL_AT`, in percent: numbers, or arrays over resamples.
        median: Median rank.
        mean: Mean rank.
    """
    found = {f"{direction}/R{k}": recall for k, recall in zip(RECALL_AT, recalls, strict=True)}
    found[f"{direction}/Rmean"] = sum(recalls) / len(recalls)
    found[f"{direction}/MdR"] = median
    found[f"{direction}/MnR"] = mean
    return found


def is_better(name: str, difference: float) -> bool:
    """Return whether a metric's change is an improvement: lower for ranks, higher otherwise."""
    return difference < 0 if name.rpartition("/")[2] in ("MdR", "MnR") else difference > 0
