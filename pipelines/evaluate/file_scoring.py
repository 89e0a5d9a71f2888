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
from pipelines.evaluate.embedding_file import comparable
from pipelines.evaluate.file_inputs import FileInputs
from pipelines.evaluate.order_pairs import OrderResult, cosines, score_order_pairs
from pipelines.evaluate.protocol import protocol_of_file
from pipelines.evaluate.rank_table import ChunksWithProgress
from pipelines.evaluate.results import write_result
from stgt.errors import STGTError
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

    def __init__(self, scores: npt.NDArray[np.float32]) -> None:
        """Store the scores.

        Args:
            scores: [N, V] float32, higher is better, -inf = not scored.
        """
        self.num_texts, self.num_videos = scores.shape
        self._scores = scores

    def chunks(self) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """Yield the index of the first text of each chunk, and the scores [texts, V] float32."""
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
    """Score the pairs of captions, whose embeddings are looked up in the file by their texts.

    Raises:
        STGTError: The file contains no texts, or not those of the pairs.
    """
    file, pairs = inputs.file, inputs.order_pairs
    if pairs is None:
        return None
    if file.captions is None:
        raise STGTError(
            f"order_pairs: {file.uri} contains no texts of captions, by which those of the pairs "
            "are found; add the array or the column captions"
        )
    row_of = {comparable(text): row for row, text in enumerate(file.captions)}
    lacking = [text for text in pairs.texts if comparable(text) not in row_of]
    if lacking:
        raise STGTError(
            f"order_pairs: {file.uri} has no embedding of {len(lacking)} of {len(pairs.texts)} "
            f"captions, such as {lacking[0]!r}; evaluate pairs whose captions are all in the file"
        )
    rows = np.array([row_of[comparable(text)] for text in pairs.texts])
    scores = file.pair_scores

    def given(asked: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        assert scores is not None
        return scores[rows[asked[:, 0]], asked[:, 1]]

    return score_order_pairs(
        pairs,
        np.ones(inputs.gallery.num_videos, dtype=bool),
        functools.partial(cosines, file.videos, file.texts[rows]),
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
