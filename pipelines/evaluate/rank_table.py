"""The table of ranks that an evaluation writes, and progress reports while scores are computed.

Legend: V videos.
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
    """Chunks of scores that report progress as they are consumed."""

    def __init__(self, scores: ScoreChunks, progress: Progress) -> None:
        self.num_texts, self.num_videos = scores.num_texts, scores.num_videos
        self._scores = scores
        self._progress = progress

    def chunks(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield the first text of each chunk and the chunk's scores [texts, V] float32."""
        for start, scores in self._scores.chunks():
            yield start, scores
            self._progress.advance(len(scores))


def rank_table(
    scores: Scores, clip_ids: list[str], captions: list[str], video_of_text: IntArray
) -> pa.Table:
    """Return a table with the rank of the correct answer for every caption and every video.

    Two evaluations are compared by these tables. Columns: direction ("t2v" or "v2t"), clip_id (the
    correct clip for t2v, the searching clip for v2t), caption (null for v2t), sim_rank (by cosine),
    rank (after reranking; null without reranking).
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
