"""From similarities to ranks and metrics of a whole gallery, missing videos included.

Legend: V videos of the gallery, N texts, K candidates; of the V videos some may be missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.common.progress import Progress
from stgt.retrieval.gallery import IntArray, Scores
from stgt.retrieval.similarity import ScoreChunks


class ChunksWithProgress:
    """Chunks of scores whose progress is told as they are gone through."""

    def __init__(self, scores: ScoreChunks, progress: Progress) -> None:
        self.num_texts, self.num_videos = scores.num_texts, scores.num_videos
        self._scores = scores
        self._progress = progress

    def chunks(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """The first text of each chunk, and its scores [texts, V] float32."""
        for start, scores in self._scores.chunks():
            yield start, scores
            self._progress.advance(len(scores))


def rank_table(
    scores: Scores, clip_ids: list[str], captions: list[str], video_of_text: IntArray
) -> pa.Table:
    """The rank of every search: what a comparison of two evaluations needs.

    Columns: direction ("t2v" or "v2t"), clip_id (the right one, or the one that searches), caption
    (t2v), sim_rank (by cosine), rank (reranked; null when nothing was).
    """
    owners = [clip_ids[video] for video in video_of_text.tolist()]
    tables = []
    for name, found, ids, texts in (
        ("t2v", scores.t2v, owners, captions),
        ("v2t", scores.v2t, clip_ids, [None] * len(clip_ids)),
    ):
        reranked = None if found.reranked is None else found.reranked.ranks
        tables.append(
            pa.table(
                {
                    "direction": pa.array([name] * len(ids)),
                    "clip_id": pa.array(ids, pa.string()),
                    "caption": pa.array(texts, pa.string()),
                    "sim_rank": pa.array(found.similarity.ranks),
                    "rank": pa.nulls(len(ids), pa.int64())
                    if reranked is None
                    else pa.array(reranked),
                }
            )
        )
    return pa.concat_tables(tables)
