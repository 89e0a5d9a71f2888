"""Scoring of a gallery in chunks: beside the whole matrix, and 100,000 videos by 100,000 captions.

The large one has embeddings of the published size and runs in a process of its own, whose memory is
the point: the whole matrix alone would be 40 GB. It takes some twenty minutes on two cores.
"""

from __future__ import annotations

import logging
import os

import numpy as np

from pipelines.bench.harness import Row, faster, in_child, median_seconds, smaller
from pipelines.common.progress import Progress
from pipelines.evaluate.rank_table import ChunksWithProgress
from stgt.retrieval.gallery import score_gallery
from stgt.retrieval.metrics import best_ranks
from stgt.retrieval.ranking import rank_both_ways, top_candidates
from stgt.retrieval.similarity import Similarity

logger = logging.getLogger(__name__)

QUERIES, WIDTH = 32, 256
K = 128
SMALL, LARGE = 3000, 100_000
LIMIT_BYTES = 8_000_000_000


def measure(device: str, repeats: int) -> list[Row]:
    """Seconds of a small gallery beside the plain way, and memory of a large one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        videos, texts = _embeddings(SMALL)
        taken = median_seconds(
            {"ours": lambda: _ours(videos, texts), "whole": lambda: _whole(videos, texts)},
            "cpu",
            repeats,
        )
    finally:
        torch.set_num_threads(threads)
    seconds, peak = in_child(_large, ())
    logger.info("100,000 x 100,000: %.0f s, %.2f GB", seconds, peak / 1e9)
    return [
        faster("score", taken["ours"], taken["whole"], 1.0),
        smaller("score/memory", "bytes", peak, LIMIT_BYTES, 1.0),
    ]


def _embeddings(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Videos [count, Q, E] and their captions [count, E], unit length."""
    generator = np.random.default_rng(0)
    videos = generator.standard_normal((count, QUERIES, WIDTH), dtype=np.float32)
    texts = np.empty((count, WIDTH), dtype=np.float32)
    for start in range(0, count, SMALL):  # in place: copies would count as memory of the scoring
        part = videos[start : start + SMALL]
        part /= np.linalg.norm(part, axis=2, keepdims=True)
        noise = generator.standard_normal((len(part), WIDTH), dtype=np.float32) / WIDTH**0.5
        both = part[:, 0] + 2 * noise
        texts[start : start + SMALL] = both / np.linalg.norm(both, axis=1, keepdims=True)
    return videos, texts


def _ours(videos: np.ndarray, texts: np.ndarray) -> None:
    rank_both_ways(Similarity(videos, texts, most_bytes=2**30), np.arange(len(texts)), K)


def _whole(videos: np.ndarray, texts: np.ndarray) -> None:
    """The plain way: all products at once, a sort of every row and column."""
    count = len(videos)
    products = texts @ videos.reshape(-1, WIDTH).T
    similarity = products.reshape(count, count, QUERIES).max(axis=2)
    right = [[row] for row in range(count)]
    for scores in (similarity, np.ascontiguousarray(similarity.T)):
        top_candidates(scores, K)
        best_ranks(scores, right)


def _large() -> None:
    import torch

    # A process of its own prints nothing unless it is told to.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(os.cpu_count() or 1)
    videos, texts = _embeddings(LARGE)
    progress = Progress("score 100,000 x 100,000", 2 * LARGE, "captions")
    chunks = ChunksWithProgress(Similarity(videos, texts), progress)

    def match(pairs: np.ndarray) -> np.ndarray:
        logger.info("%d candidate pairs", len(pairs))
        return np.zeros(len(pairs), dtype=np.float32)  # a model's work is measured elsewhere

    everything = np.ones(LARGE, dtype=np.bool_)
    scores = score_gallery(chunks, np.arange(LARGE), everything, K, match)
    found = [float(np.mean(one.similarity.ranks <= 10)) for one in (scores.t2v, scores.v2t)]
    logger.info("R@10 %.3f and %.3f", *found)
    assert min(found) > 0.01, found  # by chance it would be 0.0001
