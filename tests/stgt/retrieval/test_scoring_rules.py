"""Each scoring rule ranks a gallery as a direct computation over the whole matrix does."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

from stgt.retrieval.gallery import score_gallery
from stgt.retrieval.metrics import best_ranks
from stgt.retrieval.scoring_rules import RULES, ScoringRule
from stgt.retrieval.similarity import Similarity

TEXTS, VIDEOS, WIDTH = 12, 9, 4

FloatArray = npt.NDArray[np.float32]


def unit(values: FloatArray) -> FloatArray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def brute_force(cosine: FloatArray, logits: FloatArray, rule: ScoringRule, k: int) -> FloatArray:
    """Scores [rows, columns]; -inf for pairs that are not among the best k by cosine."""
    weights = np.exp(logits.astype(np.float64))
    probability = weights[..., 1] / weights.sum(axis=-1)
    values = {
        "cosine_and_match": cosine + probability,
        "alpro_repository": np.array(
            [[round(float(one), 4) for one in row] for row in probability], dtype=np.float64
        ),
        "alpro_lavis": cosine + logits[..., 1],
    }[rule.name]
    if rule.all_pairs:
        return values
    scores = np.full(values.shape, -np.inf)
    for row, order in enumerate(np.argsort(-cosine, axis=1)[:, :k]):
        scores[row, order] = values[row, order]
    return scores


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_those_of_the_whole_matrix(name: str, seed: int) -> None:
    rule, k = RULES[name], 4
    generator = np.random.default_rng(seed)
    videos = unit(generator.normal(size=(VIDEOS, 1, WIDTH)).astype(np.float32))
    texts = unit(generator.normal(size=(TEXTS, WIDTH)).astype(np.float32))
    logits = generator.normal(size=(TEXTS, VIDEOS, 2)).astype(np.float32)
    video_of_text = generator.integers(0, VIDEOS, TEXTS)
    asked: list[int] = []

    def match(pairs: npt.NDArray[np.int64]) -> FloatArray:
        asked.append(len(pairs))
        return rule.values_of(torch.from_numpy(logits[pairs[:, 0], pairs[:, 1]]))

    scores = score_gallery(
        Similarity(videos, texts),
        video_of_text,
        np.ones(VIDEOS, dtype=bool),
        k,
        match,
        rule=rule,
    )
    cosine = texts @ videos[:, 0].T
    t2v = best_ranks(brute_force(cosine, logits, rule, k), [[video] for video in video_of_text])
    assert scores.t2v.reranked is not None
    assert scores.v2t.reranked is not None
    assert scores.t2v.reranked.ranks.tolist() == t2v.tolist()
    own = [np.flatnonzero(video_of_text == video).tolist() for video in range(VIDEOS)]
    with_texts = [video for video in range(VIDEOS) if own[video]]
    v2t = best_ranks(
        brute_force(cosine.T, logits.transpose(1, 0, 2), rule, k)[with_texts],
        [own[video] for video in with_texts],
    )
    assert scores.v2t.reranked.ranks[with_texts].tolist() == v2t.tolist()
    if rule.all_pairs:
        assert asked == [TEXTS * VIDEOS]


def test_rounding_makes_ties_and_ties_are_pessimistic() -> None:
    """Two videos whose probabilities differ in the fifth decimal: the right one is second."""
    rule = RULES["alpro_repository"]
    odds = [np.log(0.50004 / 0.49996), np.log(0.50002 / 0.49998)]
    logits = np.array([[[0.0, odd] for odd in odds]], dtype=np.float32)

    def match(pairs: npt.NDArray[np.int64]) -> FloatArray:
        return rule.values_of(torch.from_numpy(logits[pairs[:, 0], pairs[:, 1]]))

    videos = unit(np.array([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=np.float32))
    texts = unit(np.array([[1.0, 0.5]], dtype=np.float32))
    for right in (0, 1):
        scores = score_gallery(
            Similarity(videos, texts),
            np.array([right]),
            np.ones(2, dtype=bool),
            1,
            match,
            rule=rule,
        )
        assert scores.t2v.reranked is not None
        assert scores.t2v.reranked.ranks.tolist() == [2]


def test_no_candidates_means_no_reranking_under_any_rule() -> None:
    def match(pairs: npt.NDArray[np.int64]) -> FloatArray:
        raise AssertionError("nothing is matched")

    videos = unit(np.ones((2, 1, 3), dtype=np.float32))
    texts = unit(np.ones((2, 3), dtype=np.float32))
    for rule in RULES.values():
        scores = score_gallery(
            Similarity(videos, texts), np.arange(2), np.ones(2, dtype=bool), 0, match, rule=rule
        )
        assert scores.t2v.reranked is None
