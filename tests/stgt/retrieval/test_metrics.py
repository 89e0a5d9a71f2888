"""Tests of ranks and recall against hand-computed values and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stgt.retrieval.metrics import best_ranks, retrieval_metrics
from stgt.retrieval.ranking import fuse_scores, top_candidates
from stgt.retrieval.similarity import similarity_matrix

SCORES = np.array([[0.9, 0.1, 0.5], [0.2, 0.2, 0.8], [0.3, 0.7, 0.6]])


def test_ranks_by_hand() -> None:
    assert best_ranks(SCORES, [[0], [1], [2]]).tolist() == [1, 3, 2]


def test_a_tie_counts_against_the_right_item() -> None:
    assert best_ranks(np.ones((1, 4)), [[2]]).tolist() == [4]


def test_any_of_several_right_captions_counts() -> None:
    assert best_ranks(SCORES, [[1, 2], [0, 1], [0, 1, 2]]).tolist() == [2, 2, 1]


def test_unscored_items_rank_behind_scored_ones() -> None:
    scores = np.array([[-np.inf, 0.1, -np.inf]])
    assert best_ranks(scores, [[0]]).tolist() == [3]


def test_nan_scores_and_rows_without_an_answer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"NaN in rows \[1\]"):
        best_ranks(np.array([[1.0, 0.0], [np.nan, 0.0]]), [[0], [1]])
    with pytest.raises(ValueError, match="row 1 has no correct answer"):
        best_ranks(SCORES[:2], [[0], []])
    with pytest.raises(ValueError, match="2 rows for 3"):
        best_ranks(SCORES, [[0], [1]])


def test_metrics_by_hand() -> None:
    metrics = retrieval_metrics(np.array([1, 3, 6, 12]), "t2v")
    assert metrics == {
        "t2v/R1": 25.0,
        "t2v/R5": 50.0,
        "t2v/R10": 75.0,
        "t2v/Rmean": 50.0,
        "t2v/MdR": 4.5,
        "t2v/MnR": 5.5,
    }


def test_the_median_of_an_even_number_of_ranks_keeps_its_half() -> None:
    """Ranks 1, 2, 5 and 9 by hand: half of the searches find their item at rank 3.5 or better."""
    scores = np.zeros((4, 10))
    for row, rank in enumerate((5, 1, 9, 2)):
        scores[row] = -np.arange(10)
        scores[row, rank - 1] += 0.5  # ahead of the next item, behind the one before
    ranks = best_ranks(scores, [[4], [0], [8], [1]])
    assert ranks.tolist() == [5, 1, 9, 2]
    assert retrieval_metrics(ranks, "t2v")["t2v/MdR"] == 3.5


@given(hnp.arrays(np.float64, (5, 7), elements=st.integers(-3, 3)), st.permutations(range(7)))
def test_permuting_videos_does_not_change_ranks(scores: np.ndarray, order: list[int]) -> None:
    right = [[row] for row in range(5)]
    moved = [[order.index(row)] for row in range(5)]
    assert best_ranks(scores[:, order], moved).tolist() == best_ranks(scores, right).tolist()


def test_similarity_in_chunks_equals_brute_force() -> None:
    generator = np.random.default_rng(0)
    videos = generator.normal(size=(5, 3, 4)).astype(np.float32)
    texts = generator.normal(size=(11, 4)).astype(np.float32)
    wanted = np.array([[(v @ t).max() for v in videos] for t in texts])
    for chunk in (1, 4, 100):
        np.testing.assert_allclose(similarity_matrix(videos, texts, chunk), wanted, rtol=1e-5)


def test_only_candidates_are_scored() -> None:
    scores = SCORES.astype(np.float32)
    candidates = top_candidates(scores, 2)
    assert candidates.tolist() == [[0, 2], [2, 0], [1, 2]]
    fused = fuse_scores(scores, candidates, np.full((3, 2), 0.5, np.float32))
    assert fused[0, 0] == pytest.approx(1.4)
    assert np.isneginf(fused[0, 1])
    assert np.isneginf(fused).sum() == 3


def test_more_candidates_than_items_gives_all_of_them() -> None:
    assert top_candidates(SCORES.astype(np.float32), 10).shape == (3, 3)
