"""Encodes, matches and scores a gallery, and writes metrics, ranks, pictures and the report."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from pipelines.artifacts.embeddings import Embeddings
from pipelines.common import storage
from pipelines.common.progress import Progress
from pipelines.evaluate.gallery import Gallery, reasons_of
from pipelines.evaluate.inputs import EvaluationInputs
from pipelines.evaluate.order_pairs import OrderResult, cosines, score_order_pairs
from pipelines.evaluate.protocol import protocol_of
from pipelines.evaluate.rank_table import ChunksWithProgress
from pipelines.evaluate.results import write_result
from pipelines.evaluate.stages import encode, encode_captions, match
from stgt.errors import ClipStoreError
from stgt.retrieval.gallery import score_gallery
from stgt.retrieval.scoring_rules import RULES
from stgt.retrieval.similarity import Similarity

logger = logging.getLogger(__name__)

ORDER = "order"
"""Subfolder of the output with embeddings and matched pairs of captions and counterparts."""
MATRIX_BYTES = 1024**3
"""Size limit of a similarity matrix kept in memory. A larger one is recomputed in every pass."""
PASSES, DUAL_SOFTMAX_PASSES = 2, 5
"""Number of passes over all similarities, for the progress display."""


def evaluate(inputs: EvaluationInputs) -> None:
    """Encode everything that is not encoded yet, score the gallery, and write the results.

    Raises:
        ClipStoreError: No video can be used.
        STGTError: Embeddings are not finite.
    """
    config, gallery = inputs.config, inputs.gallery
    _require_a_video(gallery, gallery.missing)
    encoded = encode(inputs)
    missing = {**gallery.missing, **encoded.missing}
    _require_a_video(gallery, missing)
    if missing:
        treated = "left out" if config.allow_missing else "counted as misses"
        logger.warning(
            "%d of %d videos cannot be used and are %s: %s",
            len(missing),
            gallery.num_videos,
            treated,
            reasons_of(missing),
        )
    order = _score_order_pairs(inputs, encoded)
    scored = gallery
    if config.allow_missing:
        scored = gallery.without(missing)
        kept = [video for video in range(gallery.num_videos) if video not in missing]
        captions = np.flatnonzero(~np.isin(gallery.video_of_caption, list(missing)))
        encoded = replace(
            encoded,
            videos=encoded.videos[kept],
            rows=encoded.rows[kept],
            texts=encoded.texts[captions],
        )
    present = np.array([row[0] >= 0 for row in encoded.rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # workers are idle while the driver scores
    try:
        videos = encoded.videos if present.all() else encoded.videos[present]
        similarity = Similarity(videos, encoded.texts, most_bytes=MATRIX_BYTES)
        passes = PASSES + (DUAL_SOFTMAX_PASSES if config.dual_softmax else 0)
        progress = Progress(f"{config.label}: score", passes * len(encoded.texts), "captions")

        scores = score_gallery(
            ChunksWithProgress(similarity, progress),
            scored.video_of_caption,
            present,
            config.k_rerank,
            functools.partial(match, inputs, scored, encoded.rows),
            config.dual_softmax,
            RULES[config.scoring],
        )
    finally:
        torch.set_num_threads(threads)
    protocol = protocol_of(inputs, scored, missing)
    size = inputs.model.inputs.image_size
    write_result(inputs, scored, scores, missing, protocol, size, order)


def _score_order_pairs(inputs: EvaluationInputs, encoded: Embeddings) -> OrderResult | None:
    """Score captions and counterparts that differ in the order or direction of events."""
    config, pairs = inputs.config, inputs.order_pairs
    present = encoded.rows[:, 0] >= 0
    if pairs is not None and config.allow_missing:
        pairs = pairs.of_present(present)
    if pairs is None:
        return None
    folder = storage.join(config.output, ORDER)
    texts = encode_captions(inputs, pairs.texts, storage.join(folder, "embeddings"))
    cosine = functools.partial(cosines, encoded.videos, texts)
    matched = replace(inputs, config=replace(config, output=folder, embeddings=inputs.embeddings))
    gallery = replace(inputs.gallery, captions=pairs.texts)

    def fused(asked: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        once, place = np.unique(asked, axis=0, return_inverse=True)
        scores = match(matched, gallery, encoded.rows, once)
        if RULES[config.scoring].adds_cosine:
            scores = cosine(once) + scores
        return scores[place.ravel()]

    return score_order_pairs(
        pairs, present, cosine, fused if config.k_rerank else None, config.resamples
    )


def _require_a_video(gallery: Gallery, missing: dict[int, str]) -> None:
    if len(missing) == gallery.num_videos:
        raise ClipStoreError(
            f"none of the {gallery.num_videos:,} videos can be used ({reasons_of(missing)}); check "
            "the videos and their paths in the manifest"
        )
