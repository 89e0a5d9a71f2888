"""What a promotion is decided by: paired intervals, and what cannot be compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.compare.evaluations import EvaluationResult
from pipelines.evaluate.rank_table import rank_table
from pipelines.registry.promotion import NotPromotedError, decide
from stgt.retrieval.gallery import Direction, Scores, all_metrics
from stgt.retrieval.ranking import Ranking

VIDEOS = 200
PROTOCOL = {
    "protocol": "pairs",
    "reranking": "the top 32 by cosine",
    "frames": "8, evenly spaced over the video, 224 pixels, squash",
    "precision": "fp32",
}


def evaluation(ranks: np.ndarray, name: str = "one", **changes: Any) -> EvaluationResult:
    """A finished evaluation with given ranks in both directions."""
    ranking = Ranking(ranks, np.empty((len(ranks), 0), np.int64), np.empty((len(ranks), 0)))
    one = Direction(ranking, ranking)
    scores = Scores(one, one, None)
    owners = np.arange(len(ranks))
    metrics, intervals = all_metrics(scores, owners, 0)
    ids = changes.pop("ids", [f"video{n}" for n in owners])
    table = rank_table(scores, ids, [f"caption {n}" for n in owners], owners)
    result = {
        "benchmark": changes.pop("benchmark", "msrvtt"),
        "title": "MSR-VTT",
        "protocol": {**PROTOCOL, **changes.pop("protocol", {})},
        "metrics": metrics,
        "intervals": intervals,
        "missing": changes.pop("missing", []),
        "checkpoint": name,
    }
    assert not changes
    return EvaluationResult(name, result, table)


@pytest.fixture
def ranks() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 21, size=VIDEOS)


def test_a_steady_gain_is_promoted_and_the_same_loss_is_not(ranks: np.ndarray) -> None:
    gained = ranks.copy()
    gained[np.flatnonzero(ranks > 1)[:16]] = 1
    decision = decide(evaluation(ranks), evaluation(gained), "t2v/R1", 0.0, 500)
    assert decision["gain"] == pytest.approx(8)
    assert 3 < decision["low"] < 8 < decision["high"] < 13
    with pytest.raises(NotPromotedError, match=r"is worse: t2v/R1 .* a gain of -8\.0"):
        decide(evaluation(gained), evaluation(ranks), "t2v/R1", 0.0, 500)


def test_the_same_ranks_are_not_worse(ranks: np.ndarray) -> None:
    decision = decide(evaluation(ranks), evaluation(ranks.copy()), "t2v/R1", 0.0, 100)
    assert (decision["gain"], decision["low"], decision["high"]) == (0, 0, 0)


def test_a_difference_that_chance_explains_needs_a_margin(ranks: np.ndarray) -> None:
    other = ranks.copy()
    first, last = np.flatnonzero(ranks == 1)[:1], np.flatnonzero(ranks > 1)[:2]
    other[first], other[last] = 5, 1  # one search lost, two won
    pair = evaluation(ranks), evaluation(other)
    with pytest.raises(NotPromotedError, match="not shown to be at least as good"):
        decide(*pair, "t2v/R1", 0.0, 500)
    decision = decide(*pair, "t2v/R1", 2.0, 500)
    assert decision["gain"] == pytest.approx(0.5)
    assert -2 <= decision["low"] < 0


def test_fewer_is_better_for_ranks(ranks: np.ndarray) -> None:
    worse = evaluation(ranks + 3, "challenger")
    with pytest.raises(NotPromotedError, match=r"t2v/MnR .* a gain of -3\.0"):
        decide(evaluation(ranks), worse, "t2v/MnR", 0.0, 100)
    assert decide(worse, evaluation(ranks), "t2v/MnR", 0.0, 100)["gain"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"benchmark": "didemo"}, "evaluate both on the same benchmark"),
        ({"ids": [f"other{n}" for n in range(VIDEOS)]}, "on other captions or videos"),
        ({"protocol": {"reranking": "none"}}, "reranking: the top 32"),
        (
            {"protocol": {"frames": "8, evenly spaced over the first 30 s of the video, 224"}},
            "frames: 8, evenly spaced over the video",
        ),
        ({"missing": [{"clip_id": "video3", "reason": "gone"}]}, r"missing videos: 0 \(champion\)"),
    ],
)
def test_what_cannot_be_compared_is_not_promoted(
    ranks: np.ndarray, changes: dict[str, Any], reason: str
) -> None:
    better = np.maximum(ranks - 5, 1)
    with pytest.raises(NotPromotedError, match=reason):
        decide(evaluation(ranks, "champion"), evaluation(better, **changes), "t2v/R1", 0.0, 100)


def test_how_a_model_reads_its_inputs_is_its_own_affair(ranks: np.ndarray) -> None:
    better = np.maximum(ranks - 5, 1)
    reads = {"frames": "16, evenly spaced over the video, 448 pixels, crop", "precision": "bf16"}
    decide(evaluation(ranks), evaluation(better, protocol=reads), "t2v/R1", 0.0, 100)


def test_a_metric_that_is_not_there_is_named_with_those_that_are(ranks: np.ndarray) -> None:
    with pytest.raises(NotPromotedError, match=r"no metric t2v/R2; set --metric to one of .*t2v/R"):
        decide(evaluation(ranks), evaluation(ranks), "t2v/R2", 0.0, 100)
