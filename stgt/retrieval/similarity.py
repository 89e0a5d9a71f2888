"""Similarity matrices of videos and texts, computed whole or in chunks.

Legend: V videos, N texts, Q query tokens, C vectors per text, E shared embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]

VIDEOS_AT_A_TIME = 1024

TEXTS_AT_A_TIME = 512

DUAL_SOFTMAX_TEMPERATURE = 0.01
"""Inverse of the logit scale of 100 that CLIP models learn."""


def similarity_matrix(
    video_embeds: FloatArray, text_embeds: FloatArray, chunk: int = TEXTS_AT_A_TIME
) -> FloatArray:
    """Compute the cosine of the best query token of each video with each text.

    Args:
        video_embeds: [V, Q, E] float, unit length.
        text_embeds: [N, E] float, unit length.
        chunk: Number of texts scored at a time.

    Returns:
        [N, V] float32.
    """
    scores = Similarity(video_embeds, text_embeds, chunk)
    return np.concatenate([part for _, part in scores.chunks()])


class ScoreChunks(Protocol):
    """Scores of all texts with all videos in chunks of texts, which can be iterated repeatedly."""

    num_texts: int
    num_videos: int

    def chunks(self) -> Iterator[tuple[int, npt.NDArray[np.floating]]]:
        """Yield the index of the first text of each chunk, and the scores [texts, V] float."""
        ...


class Similarity:
    """Cosine of the best query token of each video with each text, in chunks of texts.

    If texts have several vectors, the best pair of vectors counts.

    If all scores fit into `most_bytes` they are cached; otherwise memory holds one chunk at a time.
    """

    def __init__(
        self,
        video_embeds: FloatArray,
        text_embeds: FloatArray,
        chunk: int = TEXTS_AT_A_TIME,
        most_bytes: int = 0,
    ) -> None:
        """Store the embeddings; scores are computed on iteration.

        Args:
            video_embeds: [V, Q, E] float32, unit length.
            text_embeds: [N, E] or [N, C, E] float32, unit length.
            chunk: Number of texts scored at a time.
            most_bytes: Cache the chunks instead of recomputing them if all fit into this size.
        """
        self.num_videos, self.num_queries, _ = video_embeds.shape
        self.num_texts = len(text_embeds)
        self._videos = torch.from_numpy(np.ascontiguousarray(video_embeds, np.float32))
        self._texts = torch.from_numpy(np.ascontiguousarray(text_embeds, np.float32))
        self._chunk = chunk
        self._keeps = 4 * self.num_texts * self.num_videos <= most_bytes
        self._kept: list[FloatArray] = []

    def chunks(self) -> Iterator[tuple[int, FloatArray]]:
        """Yield the index of the first text of each chunk, and the scores [texts, V] float32."""
        for number, start in enumerate(range(0, self.num_texts, self._chunk)):
            if number < len(self._kept):
                yield start, self._kept[number]
                continue
            scores = self._compute(start)
            if self._keeps:
                self._kept.append(scores)
            yield start, scores

    def _compute(self, start: int) -> FloatArray:
        texts = self._texts[start : start + self._chunk]
        scores = torch.full((len(texts), self.num_videos), -torch.inf)
        vectors = [texts] if texts.ndim == 2 else list(texts.unbind(1))
        for first in range(0, self.num_videos, VIDEOS_AT_A_TIME):
            videos = self._videos[first : first + VIDEOS_AT_A_TIME]
            best = scores[:, first : first + len(videos)]
            for query in range(self.num_queries):  # a maximum over whole matrices is fastest
                for text in vectors:
                    torch.maximum(best, text @ videos[:, query].T, out=best)
        return scores.numpy()


class DualSoftmax:
    """Scores of cosine similarity times its dual softmax (Cheng et al. 2021, CAMoE).

    score[n, v] = s[n, v] * exp(s[n, v] / t) / sum over the competitors of exp(s / t). For
    text-to-video the competitors are all texts. The scores depend on the whole set of searching
    texts: they are transductive and do not measure the search for a single text.
    """

    def __init__(
        self,
        similarity: ScoreChunks,
        direction: str,
        temperature: float = DUAL_SOFTMAX_TEMPERATURE,
    ) -> None:
        """Compute the softmax denominators, which iterates over the similarities once for "t2v".

        Args:
            similarity: Cosine similarities.
            direction: "t2v" applies the softmax over texts, "v2t" over videos.
            temperature: Softmax temperature t.
        """
        self.num_texts, self.num_videos = similarity.num_texts, similarity.num_videos
        self._similarity = similarity
        self._direction = direction
        self._temperature = temperature
        # Cosines are at most 1, so exp((s - 1) / t) cannot overflow.
        self._sums = np.zeros(self.num_videos)
        if direction == "t2v":
            for _, scores in similarity.chunks():
                self._sums += self._exp(scores).sum(axis=0, dtype=np.float64)

    def _exp(self, scores: FloatArray) -> npt.NDArray[np.float64]:
        return np.exp((scores.astype(np.float64) - 1) / self._temperature)

    def chunks(self) -> Iterator[tuple[int, FloatArray]]:
        """Yield the index of the first text of each chunk, and the scores [texts, V] float32."""
        for start, scores in self._similarity.chunks():
            weights = self._exp(scores)
            sums = self._sums if self._direction == "t2v" else weights.sum(axis=1, keepdims=True)
            yield start, (scores * weights / sums).astype(np.float32)
