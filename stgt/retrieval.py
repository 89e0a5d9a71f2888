"""Retrieval: cosine similarity, candidates, and scores fused with the matching probability.

Legend: V videos, N texts, Q query tokens, E shared embedding, K candidates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]


def similarity_matrix(
    video_embeds: FloatArray, text_embeds: FloatArray, chunk: int = 4096
) -> FloatArray:
    """Cosine of the best query token of each video with each text.

    Args:
        video_embeds: [V, Q, E] float, unit length.
        text_embeds: [N, E] float, unit length.
        chunk: texts scored at a time, which bounds memory to V*Q*chunk floats.

    Returns:
        [N, V] float32.
    """
    videos, queries, width = video_embeds.shape
    flat = video_embeds.reshape(videos * queries, width).T
    similarity = np.empty((len(text_embeds), videos), dtype=np.float32)
    for start in range(0, len(text_embeds), chunk):
        part = text_embeds[start : start + chunk] @ flat
        similarity[start : start + chunk] = part.reshape(-1, videos, queries).max(axis=2)
    return similarity


def top_candidates(similarity: FloatArray, k: int) -> npt.NDArray[np.int64]:
    """Columns of the k highest values of each row, best first; ties keep the lower column.

    Args:
        similarity: [rows, columns] float.
        k: candidates a row; at most `columns` are given.
    """
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def fuse_scores(
    similarity: FloatArray, candidates: npt.NDArray[np.int64], match_probability: FloatArray
) -> FloatArray:
    """Reranked scores: cosine + match probability for candidates, -inf for everything else.

    Args:
        similarity: [rows, columns] float.
        candidates: [rows, K] int64, distinct columns of each row.
        match_probability: [rows, K] float in [0, 1], of each candidate pair.

    Returns:
        [rows, columns] float32; -inf marks pairs that were not scored.
    """
    scores = np.full(similarity.shape, -np.inf, dtype=np.float32)
    rows = np.arange(len(similarity))[:, None]
    scores[rows, candidates] = similarity[rows, candidates] + match_probability
    return scores
