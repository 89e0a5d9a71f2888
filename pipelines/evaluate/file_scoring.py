"""Scores a gallery by the embeddings and pair scores of a file, and writes the results.

Legend: V videos, N captions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipelines.common.progress import Progress
from pipelines.evaluate.embedding_file import ScoreArray
from pipelines.evaluate.file_inputs import FileInputs
from pipelines.evaluate.order_pairs import OrderResult, cosines, score_order_pairs
from pipelines.evaluate.protocol import protocol_of_file
from pipelines.evaluate.rank_table import ChunksWithProgress
from pipelines.evaluate.results import write_result
from stgt.retrieval.gallery import SHOWN, Direction, Scores, score_gallery
from stgt.retrieval.ranking import rank_both_ways
from stgt.retrieval.similarity import TEXTS_AT_A_TIME, Similarity

MATRIX_BYTES = 1024**3
"""Size limit of a similarity matrix kept in memory. A larger one is recomputed in every pass."""
PASSES, DUAL_SOFTMAX_PASSES = 2, 5
"""Number of passes over all similarities, for the progress display."""
FRAME_SIZE = 224
"""Edge length of frames decoded for the report, in pixels."""


class GivenScores:
    """Scores that are given for all pairs of texts and videos."""

    def __init__(self, scores: ScoreArray) -> None:
        """Store the scores.

        Args:
            scores: [N, V] of any precision, higher is better, -inf = not scored.
        """
        self.num_texts, self.num_videos = scores.shape
        self._scores = scores

    def chunks(self) -> Iterator[tuple[int, ScoreArray]]:
        """Yield the index of the first text of each chunk, and the scores [texts, V] as given."""
        for start in range(0, self.num_texts, TEXTS_AT_A_TIME):
            yield start, self._scores[start : start + TEXTS_AT_A_TIME]


def evaluate_file(inputs: FileInputs) -> None:
    """Score the gallery by cosine and by the pair scores of the file, and write the results."""
    scores = _scores(inputs)
    write_result(
        inputs,
        inputs.gallery,
        scores,
        {},
        protocol_of_file(inputs),
        FRAME_SIZE,
        _score_order_pairs(inputs),
    )


def _score_order_pairs(inputs: FileInputs) -> OrderResult | None:
    """Score the pairs of captions, which `open_file_inputs` has looked up in the file."""
    file, pairs = inputs.file, inputs.order_pairs
    if pairs is None:
        return None
    assert file.further is not None, "made by open_file_inputs"
    scores = file.further.pair_scores

    def given(asked: npt.NDArray[np.int64]) -> ScoreArray:
        assert scores is not None
        return scores[asked[:, 0], asked[:, 1]]

    return score_order_pairs(
        pairs,
        np.ones(inputs.gallery.num_videos, dtype=bool),
        functools.partial(cosines, file.videos, file.further.texts),
        None if scores is None else given,
        inputs.config.resamples,
    )


def _scores(inputs: FileInputs) -> Scores:
    config, gallery, file = inputs.config, inputs.gallery, inputs.file
    similarity = Similarity(file.videos, file.texts, most_bytes=MATRIX_BYTES)
    passes = PASSES + (DUAL_SOFTMAX_PASSES if config.dual_softmax else 0)
    progress = Progress(f"{config.label}: score", passes * len(file.texts), "captions")

    def no_match(pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        raise AssertionError(f"nothing is reranked, so {len(pairs)} pairs need no match")

    scores = score_gallery(
        ChunksWithProgress(similarity, progress),
        gallery.video_of_caption,
        np.ones(gallery.num_videos, dtype=bool),
        0,
        no_match,
        config.dual_softmax,
    )
    if file.pair_scores is None:
        return scores
    t2v, v2t = rank_both_ways(GivenScores(file.pair_scores), gallery.video_of_caption, SHOWN)
    return replace(
        scores,
        t2v=Direction(scores.t2v.similarity, t2v),
        v2t=Direction(scores.v2t.similarity, v2t),
    )
