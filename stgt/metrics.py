"""Ranks, recall at K, median and mean rank, in plain numpy.

Ties are pessimistic: an item that scores the same as the right one counts as ahead of it, so a
model that scores everything alike gets no credit. Unscored items (-inf) rank behind every scored
one.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """R1, R5, R10 in per cent, median and mean rank.

    Args:
        ranks: [rows] int64, 1 = first.
        direction: "t2v" or "v2t", the prefix of the metric names.
    """
    metrics = {f"{direction}/R{k}": float(np.mean(ranks <= k) * 100) for k in RECALL_AT}
    metrics[f"{direction}/MdR"] = float(np.median(ranks))
    metrics[f"{direction}/MnR"] = float(np.mean(ranks))
    return metrics
