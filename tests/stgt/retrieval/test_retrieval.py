"""Tests of chunked scoring against the whole matrix, and of the bootstrap against a direct draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stgt.retrieval.bootstrap import interval, resampled
from stgt.retrieval.metrics import best_ranks, is_better, retrieval_metrics
from stgt.retrieval.ranking import fuse_scores, rank_both_ways, rerank, top_candidates
from stgt.retrieval.similarity import DualSoftmax, Similarity, similarity_matrix


def embeddings(
    seed: int, videos: int, texts: int, coarse: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return video [V, Q, E] and text [N, E] embeddings, and each text's video; coarse has ties."""
    generator = np.random.default_rng(seed)
    if coarse:  # few distinct vectors, exactly representable in binary
        video = generator.integers(-1, 2, (videos, 2, 3)).astype(np.float32) / 2
        text = generator.integers(-1, 2, (texts, 3)).astype(np.float32) / 2
    else:
        video = generator.normal(size=(videos, 2, 5)).astype(np.float32)
        text = generator.normal(size=(texts, 5)).astype(np.float32)
    return video, text, generator.integers(videos, size=texts)


def rights(video_of_text: np.ndarray, videos: int) -> list[list[int]]:
    return [np.flatnonzero(video_of_text == video).tolist() for video in range(videos)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    videos=st.integers(1, 9),
    texts=st.integers(1, 12),
    k=st.integers(0, 12),
    chunk=st.integers(1, 5),
    coarse=st.booleans(),
    keeps=st.booleans(),
)
def test_ranks_and_candidates_in_chunks_are_those_of_the_matrix(
    seed: int, videos: int, texts: int, k: int, chunk: int, coarse: bool, keeps: bool
) -> None:
    video, text, video_of_text = embeddings(seed, videos, texts, coarse)
    scores = Similarity(video, text, chunk, most_bytes=10**6 if keeps else 0)
    whole = np.concatenate([part for _, part in scores.chunks()])
    np.testing.assert_allclose(
        whole, np.einsum("vqe,ne->nvq", video, text).max(axis=2), rtol=1e-5, atol=1e-6
    )
    t2v, v2t = rank_both_ways(scores, video_of_text, k)
    assert t2v.ranks.tolist() == best_ranks(whole, [[one] for one in video_of_text]).tolist()
    assert np.array_equal(t2v.candidates, top_candidates(whole, k))
    assert np.array_equal(v2t.candidates, top_candidates(whole.T, k))
    np.testing.assert_array_equal(v2t.scores, np.take_along_axis(whole.T, v2t.candidates, axis=1))
    for row, right in enumerate(rights(video_of_text, videos)):
        wanted = best_ranks(whole.T[row : row + 1], [right])[0] if right else texts + 1
        assert v2t.ranks[row] == wanted


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 9), coarse=st.booleans())
def test_reranked_ranks_are_those_of_the_fused_matrix(seed: int, k: int, coarse: bool) -> None:
    video, text, video_of_text = embeddings(seed, 6, 9, coarse)
    video_of_text[:6] = np.arange(6)  # every video has a text
    whole = similarity_matrix(video, text, 4)
    probability = np.random.default_rng(seed).integers(0, 3, whole.shape).astype(np.float32) / 2
    t2v, v2t = rank_both_ways(Similarity(video, text, 4), video_of_text, k)

    fused = fuse_scores(
        whole, t2v.candidates, np.take_along_axis(probability, t2v.candidates, axis=1)
    )
    reranked = rerank(
        t2v,
        np.take_along_axis(probability, t2v.candidates, axis=1),
        t2v.candidates == video_of_text[:, None],
        np.ones(9, dtype=np.int64),
        6,
    )
    assert reranked.ranks.tolist() == best_ranks(fused, [[one] for one in video_of_text]).tolist()
    best = -np.sort(-fused, axis=1)[:, : min(k, 6)]
    np.testing.assert_array_equal(reranked.scores, best)
    np.testing.assert_array_equal(np.take_along_axis(fused, reranked.candidates, axis=1), best)

    by_text = np.take_along_axis(probability.T, v2t.candidates, axis=1)
    fused = fuse_scores(np.ascontiguousarray(whole.T), v2t.candidates, by_text)
    right = rights(video_of_text, 6)
    reranked = rerank(
        v2t,
        by_text,
        video_of_text[v2t.candidates] == np.arange(6)[:, None],
        np.array([len(one) for one in right]),
        9,
    )
    assert reranked.ranks.tolist() == best_ranks(fused, right).tolist()


def test_a_text_whose_video_is_not_there_is_found_nowhere() -> None:
    video, text, _ = embeddings(0, 4, 3, coarse=False)
    t2v, v2t = rank_both_ways(Similarity(video, text), np.array([0, -1, 2]), 2)
    assert t2v.ranks[1] == 5
    assert v2t.ranks[[1, 3]].tolist() == [4, 4]
    again = rerank(
        t2v,
        np.ones((3, 2), np.float32),
        t2v.candidates == np.array([0, -1, 2])[:, None],
        np.array([1, 0, 1]),
        4,
    )
    assert again.ranks[1] == 5


@pytest.mark.parametrize("direction", ["t2v", "v2t"])
def test_dual_softmax_in_chunks_is_that_of_the_matrix(direction: str) -> None:
    video, text, _ = embeddings(3, 7, 11, coarse=False)
    video /= np.linalg.norm(video, axis=2, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    whole = similarity_matrix(video, text).astype(np.float64)
    weights = np.exp(whole / 0.1)
    wanted = whole * weights / weights.sum(axis=0 if direction == "t2v" else 1, keepdims=True)
    chunks = DualSoftmax(Similarity(video, text, 3), direction, 0.1).chunks()
    found = np.concatenate([part for _, part in chunks])
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)


def test_resampled_metrics_are_those_of_the_drawn_videos() -> None:
    generator = np.random.default_rng(5)
    groups = np.repeat(np.arange(8), [1, 2, 3, 1, 1, 4, 2, 1])
    ranks = generator.integers(1, 20, size=len(groups))
    found = resampled(ranks, groups, 8, "t2v", resamples=70, seed=9)
    same = np.random.default_rng(9)
    for resample in range(70):
        drawn = same.integers(8, size=8)
        rows = np.concatenate([np.flatnonzero(groups == video) for video in drawn])
        for name, value in retrieval_metrics(ranks[rows], "t2v").items():
            assert found[name][resample] == pytest.approx(value), name


def test_the_interval_of_a_recall_is_about_that_of_the_binomial() -> None:
    ranks = np.where(np.arange(1000) < 400, 1, 50)
    values = resampled(ranks, np.arange(1000), 1000, "v2t")["v2t/R1"]
    low, high = interval(values)
    error = 1.96 * (0.4 * 0.6 / 1000) ** 0.5 * 100
    assert low == pytest.approx(40 - error, abs=0.5)
    assert high == pytest.approx(40 + error, abs=0.5)


def test_captions_of_one_video_do_not_count_as_many() -> None:
    """Twenty captions per video that succeed and fail together tell no more than one caption."""
    ranks = np.where(np.arange(50) < 20, 1, 50)
    one = interval(resampled(ranks, np.arange(50), 50, "t2v")["t2v/R1"])
    many = interval(
        resampled(np.repeat(ranks, 20), np.repeat(np.arange(50), 20), 50, "t2v")["t2v/R1"]
    )
    assert many == pytest.approx(one)


def test_more_recall_and_lower_ranks_are_better() -> None:
    assert is_better("t2v/R1", 0.5)
    assert is_better("sim/v2t/Rmean", 0.5)
    assert not is_better("t2v/MdR", 0.5)
    assert is_better("t2v/MnR", -1.0)
