"""Encodes, matches and scores a gallery, and writes metrics, ranks, pictures and the report."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import replace

import numpy as np
import torch

from pipelines.common import storage
from pipelines.common.progress import Progress
from pipelines.evaluate import pictures, report
from pipelines.evaluate.gallery import Gallery, reasons_of
from pipelines.evaluate.inputs import METRICS, PICTURE, RANKS, REPORT, EvaluationInputs
from pipelines.evaluate.protocol import metric_lines, protocol_of
from pipelines.evaluate.rank_table import ChunksWithProgress, rank_table
from pipelines.evaluate.stages import encode, match
from stgt.errors import ClipStoreError
from stgt.retrieval.gallery import Scores, all_metrics, score_gallery
from stgt.retrieval.similarity import Similarity

logger = logging.getLogger(__name__)

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
        )
    finally:
        torch.set_num_threads(threads)
    _write_result(inputs, scored, scores, missing)


def _require_a_video(gallery: Gallery, missing: dict[int, str]) -> None:
    if len(missing) == gallery.num_videos:
        raise ClipStoreError(
            f"none of the {gallery.num_videos:,} videos can be used ({reasons_of(missing)}); check "
            "the videos and their paths in the manifest"
        )


def _write_result(
    inputs: EvaluationInputs,
    scored: Gallery,
    scores: Scores,
    missing: dict[int, str],
) -> None:
    config = inputs.config
    prefix = "partial/" if config.allow_missing and missing else ""
    metrics, intervals = all_metrics(scores, scored.video_of_caption, config.resamples)
    metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
    intervals = {f"{prefix}{name}": value for name, value in intervals.items()}
    protocol = protocol_of(inputs, scored, missing)
    result = {
        "benchmark": config.benchmark,
        "title": inputs.benchmark.title,
        "protocol": protocol,
        "metrics": metrics,
        "intervals": intervals,
        "clips": scored.num_videos,
        "captions": len(scored.captions),
        "missing": [
            {"clip_id": inputs.gallery.clip_ids[video], "reason": reason}
            for video, reason in sorted(missing.items())
        ],
        "checkpoint": config.checkpoint,
        "tracked": False,
    }
    table = rank_table(scores, scored.clip_ids, scored.captions, scored.video_of_caption)
    storage.write_table(storage.join(config.output, RANKS), table)
    frames_of = pictures.frame_reader(config, inputs.model["vision"]["image_size"], scored)
    try:
        picture = pictures.draw_retrieval(scored, scores.t2v, frames_of, config.num_pictures)
        page = report.page(result, table, scored, scores, frames_of, config.num_pictures)
    finally:
        frames_of.close()
    storage.write_bytes(storage.join(config.output, PICTURE), picture)
    storage.write_bytes(storage.join(config.output, REPORT), page.encode())
    for name, value in protocol.items():
        logger.info("%s: %s", name, value)
    for line in metric_lines(metrics, intervals):
        logger.info("%s", line)
    storage.write_json(storage.join(config.output, METRICS), result)
