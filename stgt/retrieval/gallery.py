"""From similarities to ranks and metrics of a whole gallery, missing videos included.

Legend: V videos of the gallery, N texts, K candidates; of the V videos some may be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stgt.retrieval.bootstrap import interval, resampled
from stgt.retrieval.metrics import RECALL_AT, retrieval_metrics
from stgt.retrieval.ranking import Ranking, rank_both_ways, rerank
from stgt.retrieval.similarity import DualSoftmax, ScoreChunks

IntArray = npt.NDArray[np.int64]

Match = Callable[[IntArray], npt.NDArray[np.float32]]
"""Pairs [n, 2] (text, video) -> their matching probabilities [n]."""

SHOWN = 5
"""Candidates that are kept to be looked at, also when fewer are reranked."""

MISS = max(RECALL_AT) + 1
"""Least rank of what cannot be found, so that it is a miss in a gallery of fewer videos too."""


@dataclass(frozen=True)
class Direction:
    """Searches in one direction, by cosine and reranked."""

    similarity: Ranking
    reranked: Ranking | None

    @property
    def best(self) -> Ranking:
        """Reranked where that was asked for."""
        return self.similarity if self.reranked is None else self.reranked


@dataclass(frozen=True)
class Scores:
    """What all searches found; columns of candidates are videos and texts of the gallery."""

    t2v: Direction
    """N rows."""
    v2t: Direction
    """V rows."""
    dual_softmax: tuple[IntArray, IntArray] | None
    """Ranks [N] and [V]; transductive."""


def score_gallery(
    similarity: ScoreChunks,
    video_of_text: IntArray,
    present: npt.NDArray[np.bool_],
    k: int,
    match: Match,
    dual_softmax: bool = False,
) -> Scores:
    """Rank a gallery both ways, by cosine and reranked.

    Args:
        similarity: of N texts with the videos that are there.
        video_of_text: [N] int64 video of the gallery.
        present: [V] bool, True where a video is there. Searches for missing ones are misses.
        k: candidates that are reranked; 0 for none.
        match: gives the matching probability of pairs; each pair is asked for once.
        dual_softmax: also rank by dual softmax.
    """
    numbers = np.flatnonzero(present)
    column = np.full(len(present), -1, dtype=np.int64)
    column[numbers] = np.arange(len(numbers))
    right = column[video_of_text]
    t2v, v2t = rank_both_ways(similarity, right, max(k, SHOWN))
    again: tuple[Ranking, Ranking] | tuple[None, None] = (None, None)
    if k:
        again = _rerank(_first(t2v, k), _first(v2t, k), right, numbers, match)
    dual = None
    if dual_softmax:
        by_text, _ = rank_both_ways(DualSoftmax(similarity, "t2v"), right, 0)
        _, by_video = rank_both_ways(DualSoftmax(similarity, "v2t"), right, 0)
        dual = (
            _t2v_of(by_text, right, numbers, present).ranks,
            _v2t_of(by_video, numbers, present, len(right)).ranks,
        )
    return Scores(
        t2v=Direction(
            _t2v_of(t2v, right, numbers, present),
            None if again[0] is None else _t2v_of(again[0], right, numbers, present),
        ),
        v2t=Direction(
            _v2t_of(v2t, numbers, present, len(right)),
            None if again[1] is None else _v2t_of(again[1], numbers, present, len(right)),
        ),
        dual_softmax=dual,
    )


def _first(found: Ranking, k: int) -> Ranking:
    """The same with the first k candidates only."""
    return Ranking(found.ranks, found.candidates[:, :k], found.scores[:, :k])


def _rerank(
    t2v: Ranking, v2t: Ranking, right: IntArray, numbers: IntArray, match: Match
) -> tuple[Ranking, Ranking]:
    """Both directions by cosine + probability, from pairs that are matched once for both."""
    num_texts, num_videos = len(t2v.ranks), len(v2t.ranks)
    of_texts = np.arange(num_texts)[:, None] * num_videos + t2v.candidates
    of_videos = v2t.candidates * num_videos + np.arange(num_videos)[:, None]
    keys = np.unique(np.concatenate([of_texts.ravel(), of_videos.ravel()]))
    pairs = np.stack([keys // num_videos, numbers[keys % num_videos]], axis=1)
    probability = match(pairs)
    own = np.bincount(right[right >= 0], minlength=num_videos)
    return (
        rerank(
            t2v,
            probability[np.searchsorted(keys, of_texts)],
            t2v.candidates == right[:, None],
            (right >= 0).astype(np.int64),
            num_videos,
        ),
        rerank(
            v2t,
            probability[np.searchsorted(keys, of_videos)],
            right[v2t.candidates] == np.arange(num_videos)[:, None],
            own,
            num_texts,
        ),
    )


def _t2v_of(
    found: Ranking, right: IntArray, numbers: IntArray, present: npt.NDArray[np.bool_]
) -> Ranking:
    """The same in the gallery's numbering of videos; texts of missing videos are misses."""
    worst = max(len(present) + 1, MISS)
    return Ranking(
        np.where(right >= 0, found.ranks, worst), numbers[found.candidates], found.scores
    )


def _v2t_of(
    found: Ranking, numbers: IntArray, present: npt.NDArray[np.bool_], num_texts: int
) -> Ranking:
    """The same with rows for missing videos too, which are misses and have no candidates."""
    count, width = len(present), found.candidates.shape[1]
    ranks = np.full(count, max(num_texts + 1, MISS), dtype=np.int64)
    candidates = np.full((count, width), -1, dtype=np.int64)
    scores = np.full((count, width), -np.inf, dtype=np.float32)
    ranks[numbers], candidates[numbers], scores[numbers] = (
        found.ranks,
        found.candidates,
        found.scores,
    )
    return Ranking(ranks, candidates, scores)


def all_metrics(
    scores: Scores, video_of_text: IntArray, resamples: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """All metrics, and their 95 % intervals by the bootstrap over videos.

    Args:
        scores: the searches.
        video_of_text: [N] int64.
        resamples: of the bootstrap; 0 gives no intervals.

    Returns:
        `t2v/...` and `v2t/...` reranked, `sim/...` by cosine alone, `dsl/...` by dual softmax, each
        with `Rmean`, the mean recall of both directions.
    """
    kinds: dict[str, tuple[IntArray, IntArray]] = {}
    if scores.t2v.reranked is not None and scores.v2t.reranked is not None:
        kinds[""] = scores.t2v.reranked.ranks, scores.v2t.reranked.ranks
    kinds["sim/"] = scores.t2v.similarity.ranks, scores.v2t.similarity.ranks
    if scores.dual_softmax is not None:
        kinds["dsl/"] = scores.dual_softmax
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for prefix, (texts, videos) in kinds.items():
        found = {**retrieval_metrics(texts, "t2v"), **retrieval_metrics(videos, "v2t")}
        found["Rmean"] = (found["t2v/Rmean"] + found["v2t/Rmean"]) / 2
        metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        if resamples:
            drawn = resampled_metrics(texts, videos, video_of_text, resamples)
            intervals |= {f"{prefix}{name}": interval(one) for name, one in drawn.items()}
    return metrics, intervals


def resampled_metrics(
    t2v: IntArray, v2t: IntArray, video_of_text: IntArray, resamples: int
) -> dict[str, npt.NDArray[np.float64]]:
    """Metrics of both directions in each resample of the videos."""
    count = len(v2t)
    drawn = {
        **resampled(t2v, video_of_text, count, "t2v", resamples),
        **resampled(v2t, np.arange(count), count, "v2t", resamples),
    }
    drawn["Rmean"] = (drawn["t2v/Rmean"] + drawn["v2t/Rmean"]) / 2
    return drawn
