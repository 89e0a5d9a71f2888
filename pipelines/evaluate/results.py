"""Writes metrics, ranks, pictures and the report of an evaluation of a model or of embeddings."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any, TypeAlias

from pipelines.common import storage
from pipelines.evaluate import pictures, report
from pipelines.evaluate.file_inputs import FileInputs
from pipelines.evaluate.gallery import Gallery
from pipelines.evaluate.inputs import METRICS, PICTURE, RANKS, REPORT, EvaluationInputs
from pipelines.evaluate.known_galleries import recognize
from pipelines.evaluate.leakage import NOT_CHECKED, check_leakage
from pipelines.evaluate.order_pairs import TABLE as ORDER_TABLE
from pipelines.evaluate.order_pairs import OrderResult
from pipelines.evaluate.protocol import metric_lines
from pipelines.evaluate.rank_table import rank_table
from stgt.retrieval.gallery import Scores, all_metrics

logger = logging.getLogger(__name__)

Inputs: TypeAlias = EvaluationInputs | FileInputs

ORDERS_IN_PICTURE = 4
"""Number of pairs of captions that differ in the order of events in the picture."""
LEAKAGE = "leakage"
"""Part of the protocol that says whether test clips were looked for in the training data."""


def write_result(
    inputs: Inputs,
    scored: Gallery,
    scores: Scores,
    missing: dict[int, str],
    protocol: dict[str, str],
    frame_size: int,
    order: OrderResult | None = None,
) -> None:
    """Write everything that an evaluation leaves in its output folder, `metrics.json` last.

    Args:
        inputs: What was evaluated.
        scored: The part of its gallery that was scored.
        scores: Results of all searches.
        missing: Videos that cannot be used, each with its reason.
        protocol: The protocol in words, by topic.
        frame_size: Edge length of frames decoded from a video, in pixels.
        order: Scores of captions and counterparts that differ in the order of events.
    """
    config = inputs.config
    prefix = "partial/" if config.allow_missing and missing else ""
    metrics, intervals = all_metrics(scores, scored.video_of_caption, config.resamples)
    if order is not None:
        metrics |= order.metrics
        intervals |= order.intervals
        protocol = {**protocol, "order pairs": _order_in_words(order)}
    leakage = None
    if inputs.training is not None:
        leakage = check_leakage(config, inputs.gallery, inputs.training)
    protocol = {**protocol, LEAKAGE: NOT_CHECKED if leakage is None else str(leakage)}
    metrics = {f"{prefix}{name}": value for name, value in metrics.items()}
    intervals = {f"{prefix}{name}": value for name, value in intervals.items()}
    known = recognize(scored.clip_ids, len(scored.captions))
    result: dict[str, Any] = {
        "benchmark": config.benchmark,
        "title": inputs.benchmark.title,
        "gallery": None if known is None else known.name,
        "protocol": protocol,
        "metrics": metrics,
        "intervals": intervals,
        "clips": scored.num_videos,
        "captions": len(scored.captions),
        "missing": [
            {"clip_id": inputs.gallery.clip_ids[video], "reason": reason}
            for video, reason in sorted(missing.items())
        ],
        "leakage": {"checked": False} if leakage is None else leakage.to_dict(),
        "checkpoint": config.checkpoint,
        "tracked": False,
    }
    if config.embedding_file is not None:
        result["embedding_file"] = config.embedding_file
    table = rank_table(scores, scored.clip_ids, scored.captions, scored.video_of_caption)
    storage.write_table(storage.join(config.output, RANKS), table)
    if order is not None:
        storage.write_table(storage.join(config.output, ORDER_TABLE), order.table)
    frames_of = None
    if config.data is not None:
        frames_of = pictures.frame_reader(config, frame_size, scored)
    picture = None
    try:
        if frames_of is not None:
            picture = pictures.draw_retrieval(
                scored,
                scores.t2v,
                frames_of,
                config.num_pictures,
                [] if order is None else order.examples(ORDERS_IN_PICTURE),
            )
        page = report.page(result, table, scored, scores, frames_of, config.num_pictures, order)
    finally:
        if frames_of is not None:
            frames_of.close()
    if picture is not None:
        storage.write_bytes(storage.join(config.output, PICTURE), picture)
    storage.write_bytes(storage.join(config.output, REPORT), page.encode())
    for name, value in protocol.items():
        logger.info("%s: %s", name, value)
    for line in metric_lines(metrics, intervals):
        logger.info("%s", line)
    storage.write_json(storage.join(config.output, METRICS), result)


def _order_in_words(order: OrderResult) -> str:
    counted = Counter(order.table["kind"].to_pylist())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counted.items()))
    return (
        f"{len(order.table):,} pairs of captions that differ only in the order or direction of "
        f"events ({kinds}); equal scores count as half, and chance is 50 %"
    )
