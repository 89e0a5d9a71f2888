"""Ranks and metrics of a whole gallery, some of whose videos may be missing.

Legend: V videos of the gallery, including missing ones, N texts, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from stgt.retrieval.bootstrap import interval, resampled
from stgt.retrieval.metrics import RECALL_AT, retrieval_metrics
from stgt.retrieval.ranking import Ranking, rank_both_ways, rerank
from stgt.retrieval.scoring_rules import DEFAULT_RULE, ScoringRule
from stgt.retrieval.similarity import DualSoftmax, ScoreChunks

IntArray = npt.NDArray[np.int64]

Match = Callable[[IntArray], npt.NDArray[np.float32]]
"""Maps pairs (text, video) [n, 2] to what matching contributes to their scores [n]; with the
default rule, the match probabilities."""

SHOWN = 5
"""Minimum number of candidates kept for display, even if fewer are reranked."""

MISS = max(RECALL_AT) + 1
"""Minimum rank of an item that cannot be found, so that it is a miss even in a small gallery."""


@dataclass(frozen=True)
class Direction:
    """Search results in one direction, by cosine and reranked."""

    similarity: Ranking
    reranked: Ranking | None

    @property
    def best(self) -> Ranking:
        """The reranked results if there are any, otherwise those by cosine."""
        return self.similarity if self.reranked is None else self.reranked


@dataclass(frozen=True)
class Scores:
    """Results of all searches. Candidates are numbered by the gallery's videos and texts."""

    t2v: Direction
    """N rows."""
    v2t: Direction
    """V rows."""
    dual_softmax: tuple[IntArray, IntArray] | None
    """Ranks [N] and [V] by dual softmax, which is transductive."""


def score_gallery(
    similarity: ScoreChunks,
    video_of_text: IntArray,
    present: npt.NDArray[np.bool_],
    k: int,
    match: Match,
    dual_softmax: bool = False,
    rule: ScoringRule = DEFAULT_RULE,
) -> Scores:
    """Rank a gallery in both directions, by cosine and reranked.

    Args:
        similarity: Similarities of N texts with the videos that are present.
        video_of_text: [N] int64, gallery index of each text's video.
        present: [V] bool, False for missing videos. Searches for missing videos are misses.
        k: Number of candidates to rerank; 0 disables reranking.
        match: Computes what matching contributes to the scores of pairs; called with each pair
            once.
        dual_softmax: Whether to also rank by dual softmax.
        rule: How the scores of reranked pairs are made. A rule for all pairs reranks everything,
            unless k is 0.
    """
    if rule.all_pairs and k:
        k = max(similarity.num_texts, similarity.num_videos)
    numbers = np.flatnonzero(present)
    column = np.full(len(present), -1, dtype=np.int64)
    column[numbers] = np.arange(len(numbers))
    right = column[video_of_text]
    t2v, v2t = rank_both_ways(similarity, right, max(k, SHOWN))
    again: tuple[Ranking, Ranking] | tuple[None, None] = (None, None)
    if k:
        again = _rerank(_first(t2v, k), _first(v2t, k), right, numbers, match, rule)
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
    """Return a ranking with only the first k candidates."""
    return Ranking(found.ranks, found.candidates[:, :k], found.scores[:, :k])


def _rerank(
    t2v: Ranking,
    v2t: Ranking,
    right: IntArray,
    numbers: IntArray,
    match: Match,
    rule: ScoringRule,
) -> tuple[Ranking, Ranking]:
    """Rerank both directions by a rule, matching each pair once."""
    if not rule.adds_cosine:
        t2v, v2t = (replace(one, scores=np.zeros_like(one.scores)) for one in (t2v, v2t))
    num_texts, num_videos = len(t2v.ranks), len(v2t.ranks)
    of_texts = np.arange(num_texts)[:, None] * num_videos + t2v.candidates
    of_videos = v2t.candidates * num_videos + np.arange(num_videos)[:, None]
    keys = np.unique(np.concatenate([of_texts.ravel(), of_videos.ravel()]))
    pairs = np.stack([keys // num_videos, numbers[keys % num_videos]], axis=1)
    matched = match(pairs)
    own = np.bincount(right[right >= 0], minlength=num_videos)
    return (
        rerank(
            t2v,
            matched[np.searchsorted(keys, of_texts)],
            t2v.candidates == right[:, None],
            (right >= 0).astype(np.int64),
            num_videos,
        ),
        rerank(
            v2t,
            matched[np.searchsorted(keys, of_videos)],
            right[v2t.candidates] == np.arange(num_videos)[:, None],
            own,
            num_texts,
        ),
    )


def _t2v_of(
    found: Ranking, right: IntArray, numbers: IntArray, present: npt.NDArray[np.bool_]
) -> Ranking:
    """Renumber videos as in the gallery; texts of missing videos become misses."""
    worst = max(len(present) + 1, MISS)
    return Ranking(
        np.where(right >= 0, found.ranks, worst), numbers[found.candidates], found.scores
    )


def _v2t_of(
    found: Ranking, numbers: IntArray, present: npt.NDArray[np.bool_], num_texts: int
) -> Ranking:
    """Add rows for missing videos, which are misses and have no candidates."""
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
    """Compute all metrics and their 95 % intervals from a bootstrap over videos.

    Args:
        scores: Results of all searches.
        video_of_text: [N] int64, gallery index of each text's video.
        resamples: Number of bootstrap resamples; 0 skips intervals.

    Returns:
        Metrics and intervals: `t2v/...` and `v2t/...` after reranking, `sim/...` by cosine alone,
        and `dsl/...` by dual softmax, each with `Rmean`, the mean recall of both directions.
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
    """Compute the metrics of both directions in each resample of the videos."""
    count = len(v2t)
    drawn = {
        **resampled(t2v, video_of_text, count, "t2v", resamples),
        **resampled(v2t, np.arange(count), count, "v2t", resamples),
    }
    drawn["Rmean"] = (drawn["t2v/Rmean"] + drawn["v2t/Rmean"]) / 2
    return drawn
