"""Ranks and candidates from chunked similarities, and reranking of candidates.

Legend: V videos, N texts, Q query tokens, E shared embedding, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stgt.retrieval.similarity import VIDEOS_AT_A_TIME, FloatArray, ScoreChunks

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranking:
    """Results of R searches (rows) among C items (columns)."""

    ranks: IntArray
    """[R] int64, rank of the best-ranked correct item, 1 = first; ties are pessimistic."""
    candidates: IntArray
    """[R, K] int64, columns of the best items, best first; ties go to the lower column."""
    scores: FloatArray
    """[R, K], scores of the candidates: float32, or float64 if the given scores are."""


def rank_both_ways(scores: ScoreChunks, video_of_text: IntArray, k: int) -> tuple[Ranking, Ranking]:
    """Compute ranks and candidates in both directions without holding the whole score matrix.

    A text has one correct video. For a video all its texts are correct: the best-ranked one counts,
    and the others do not lower its rank.

    Args:
        scores: Scores of N texts with V videos.
        video_of_text: [N] int64, column of the correct video; -1 if it is not among the V videos.
        k: Maximum number of candidates per row.

    Returns:
        Text to video [N rows, V columns], and video to text [V rows, N columns]. A text without its
        video gets rank V + 1, and a video without texts rank N + 1.
    """
    k_videos, k_texts = min(k, scores.num_videos), min(k, scores.num_texts)
    ranks = np.empty(scores.num_texts, dtype=np.int64)
    candidates = np.empty((scores.num_texts, k_videos), dtype=np.int64)
    values = np.zeros((scores.num_texts, k_videos), dtype=np.float32)
    right = np.full(scores.num_texts, -np.inf, dtype=np.float32)
    best = np.full(scores.num_videos, -np.inf, dtype=np.float32)
    ahead = _RunningTop(scores.num_videos, k_texts)
    for start, chunk in scores.chunks():
        # Rounded to fewer bits, different scores would become ties.
        kind = np.result_type(right, chunk)
        right, best, values = (one.astype(kind, copy=False) for one in (right, best, values))
        rows = slice(start, start + len(chunk))
        video = video_of_text[rows]
        known = video >= 0
        right[rows][known] = chunk[np.flatnonzero(known), video[known]]
        ranks[rows] = np.where(
            known, (chunk >= right[rows][:, None]).sum(axis=1), scores.num_videos + 1
        )
        candidates[rows], values[rows] = _top(chunk, k_videos)
        np.maximum.at(best, video[known], right[rows][known])
        ahead.add(chunk, start)
    known = video_of_text >= 0
    # A video's own texts with the best score, which do not count against it.
    own = np.zeros(scores.num_videos, dtype=np.int64)
    equal = right[known] >= best[video_of_text[known]]
    np.add.at(own, video_of_text[known][equal], 1)
    at_least = np.zeros(scores.num_videos, dtype=np.int64)
    for _, chunk in scores.chunks():
        at_least += (chunk >= best[None, :]).sum(axis=0)
    v2t_ranks = np.where(own > 0, 1 + at_least - own, scores.num_texts + 1)
    return Ranking(ranks, candidates, values), Ranking(v2t_ranks, *ahead.sorted())


def _top_columns(scores: FloatArray, k: int) -> IntArray:
    """Return columns [rows, k] of each row's k highest values, ascending; lower ones win ties."""
    columns = scores.shape[1]
    if k == 0:
        return np.empty((len(scores), 0), dtype=np.int64)
    if k >= columns:
        return np.tile(np.arange(columns), (len(scores), 1))
    least = np.partition(scores, columns - k, axis=1)[:, columns - k]
    chosen = scores >= least[:, None]
    for row in np.flatnonzero(chosen.sum(axis=1) > k):  # rows with ties for the last candidate
        tied = np.flatnonzero(scores[row] == least[row])
        spare = int(chosen[row].sum()) - k
        chosen[row, tied[len(tied) - spare :]] = False
    return np.nonzero(chosen)[1].reshape(len(scores), k)


def _by_score(columns: IntArray, values: FloatArray) -> tuple[IntArray, FloatArray]:
    """Sort candidates by descending score; ties keep their ascending order of columns."""
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1), np.take_along_axis(values, order, axis=1)


def _top(scores: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Return columns and values [rows, k] of each row's highest values, best first."""
    columns = _top_columns(scores, k)
    return _by_score(columns, np.take_along_axis(scores, columns, axis=1))


class _RunningTop:
    """The highest-scoring texts of each video so far, in the order of the texts."""

    def __init__(self, num_videos: int, k: int) -> None:
        self._k = k
        self._texts = np.empty((num_videos, 0), dtype=np.int64)
        self._values = np.empty((num_videos, 0), dtype=np.float32)

    def add(self, chunk: FloatArray, start: int) -> None:
        """Add the scores [texts, V] of a chunk of texts that starts at index `start`."""
        if self._k == 0:
            return
        kept_texts, kept_values = [], []
        # In blocks of videos: a transposed copy of the whole chunk would double the memory.
        for first in range(0, len(self._texts), VIDEOS_AT_A_TIME):
            rows = slice(first, first + VIDEOS_AT_A_TIME)
            new = np.ascontiguousarray(chunk[:, rows].T)
            values = np.concatenate([self._values[rows], new], axis=1)
            numbers = np.broadcast_to(np.arange(start, start + len(chunk)), new.shape)
            texts = np.concatenate([self._texts[rows], numbers], axis=1)
            chosen = _top_columns(values, self._k)
            kept_texts.append(np.take_along_axis(texts, chosen, axis=1))
            kept_values.append(np.take_along_axis(values, chosen, axis=1))
        self._texts, self._values = np.concatenate(kept_texts), np.concatenate(kept_values)

    def sorted(self) -> tuple[IntArray, FloatArray]:
        """Return texts and scores [V, K], best first."""
        return _by_score(self._texts, self._values)


def top_candidates(similarity: FloatArray, k: int) -> IntArray:
    """Return columns of the k highest values of each row, best first; ties go to the lower column.

    Args:
        similarity: [rows, columns] float.
        k: Number of candidates per row, limited to `columns`.
    """
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def fuse_scores(
    similarity: FloatArray, candidates: IntArray, match_probability: FloatArray
) -> FloatArray:
    """Add match probabilities to the similarities of candidates; all other scores are -inf.

    Args:
        similarity: [rows, columns] float.
        candidates: [rows, K] int64, distinct columns of each row.
        match_probability: [rows, K] float in [0, 1], for each candidate pair.

    Returns:
        [rows, columns] float32; -inf marks pairs that were not scored.
    """
    scores = np.full(similarity.shape, -np.inf, dtype=np.float32)
    rows = np.arange(len(similarity))[:, None]
    scores[rows, candidates] = similarity[rows, candidates] + match_probability
    return scores


def rerank(
    found: Ranking,
    match_probability: FloatArray,
    is_right: npt.NDArray[np.bool_],
    num_right: IntArray,
    num_columns: int,
) -> Ranking:
    """Rerank candidates by their scores + match probability; other items count as not scored.

    Args:
        found: Ranking by cosine, with the scores that matching is added to.
        match_probability: [R, K] float, for each candidate: its match probability in [0, 1], or
            what else a rule of `scoring_rules` takes from matching.
        is_right: [R, K] bool, True where a candidate is a correct answer.
        num_right: [R] int64, number of correct answers among all columns.
        num_columns: C.

    Returns:
        A ranking whose ranks equal those of `fuse_scores` with pessimistic ties: if none of a row's
        correct answers is a candidate, they rank behind all incorrect items. A row without any
        correct answer keeps its rank by cosine. Tied candidates keep their order by cosine.
    """
    fused = found.scores + match_probability.astype(np.float32)
    best = np.where(is_right, fused, -np.inf).max(axis=1, initial=-np.inf)
    ahead = (~is_right & (fused >= best[:, None])).sum(axis=1)
    among = is_right.any(axis=1)
    ranks = np.where(among, 1 + ahead, 1 + num_columns - num_right)
    ranks = np.where(num_right == 0, found.ranks, ranks)
    order = np.argsort(-fused, axis=1, kind="stable")
    return Ranking(
        ranks=ranks,
        candidates=np.take_along_axis(found.candidates, order, axis=1),
        scores=np.take_along_axis(fused, order, axis=1),
    )
