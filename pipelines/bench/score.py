"""Scoring of a gallery in chunks: speed against the full matrix, and memory at 100,000 x 100,000.

The large gallery has embeddings of the published size. It runs in a separate process to measure its
memory; the full matrix alone would take 40 GB. It takes approximately 20 minutes on two cores.
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
"""Candidates per row: four times the published number, as in all recorded measurements."""
SMALL, LARGE = 3000, 100_000


def measure(device: str, repeats: int) -> list[Row]:
    """Measure time on a small gallery against the full matrix, and memory on a large gallery."""
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
        faster("score", taken["ours"], taken["whole"]),
        smaller("score/memory", "bytes", peak),
    ]


def _embeddings(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings of videos [count, Q, E] and their captions [count, E], unit length."""
    generator = np.random.default_rng(0)
    videos = generator.standard_normal((count, QUERIES, WIDTH), dtype=np.float32)
    texts = np.empty((count, WIDTH), dtype=np.float32)
    for start in range(0, count, SMALL):  # in place, since copies would add to peak memory
        part = videos[start : start + SMALL]
        part /= np.linalg.norm(part, axis=2, keepdims=True)
        noise = generator.standard_normal((len(part), WIDTH), dtype=np.float32) / WIDTH**0.5
        both = part[:, 0] + 2 * noise
        texts[start : start + SMALL] = both / np.linalg.norm(both, axis=1, keepdims=True)
    return videos, texts


def _ours(videos: np.ndarray, texts: np.ndarray) -> None:
    rank_both_ways(Similarity(videos, texts, most_bytes=2**30), np.arange(len(texts)), K)


def _whole(videos: np.ndarray, texts: np.ndarray) -> None:
    """Score with all products in a single matrix, and sort every row and column."""
    count = len(videos)
    products = texts @ videos.reshape(-1, WIDTH).T
    similarity = products.reshape(count, count, QUERIES).max(axis=2)
    right = [[row] for row in range(count)]
    for scores in (similarity, np.ascontiguousarray(similarity.T)):
        top_candidates(scores, K)
        best_ranks(scores, right)


def _large() -> None:
    import torch

    # The new process has no logging configuration yet.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(os.cpu_count() or 1)
    videos, texts = _embeddings(LARGE)
    progress = Progress("score 100,000 x 100,000", 2 * LARGE, "captions")
    chunks = ChunksWithProgress(Similarity(videos, texts), progress)

    def match(pairs: np.ndarray) -> np.ndarray:
        logger.info("%d candidate pairs", len(pairs))
        return np.zeros(len(pairs), dtype=np.float32)  # matching is measured in `rerank`

    everything = np.ones(LARGE, dtype=np.bool_)
    scores = score_gallery(chunks, np.arange(LARGE), everything, K, match)
    found = [float(np.mean(one.similarity.ranks <= 10)) for one in (scores.t2v, scores.v2t)]
    logger.info("R@10 %.3f and %.3f", *found)
    assert min(found) > 0.01, found  # chance level is 0.0001
