"""The report of an evaluation as a self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipelines.common.pages import render_page
from pipelines.evaluate.gallery import Gallery, spread
from pipelines.evaluate.order_pairs import OrderResult
from pipelines.evaluate.pictures import FRAMES, TOP, FrameReader
from stgt.retrieval.gallery import Scores
from stgt.retrieval.metrics import RECALL_AT
from stgt.retrieval.order_pairs import ORDER_ACCURACY, order_success

EDGE = 72
"""Edge length of a frame, in pixels."""
QUALITY = 80
MOST_K = 50
"""Largest k of the recall curve."""
RANK_EDGES = (1, 2, 5, 10, 20, 50, 100, 500, 1000)
"""Lowest rank of each histogram bar."""
EXAMPLES = 12
"""Number of captions in each list."""
DIRECTIONS = {"t2v": "text to video", "v2t": "video to text"}
KINDS = {"": "reranked", "sim/": "cosine only", "dsl/": "dual softmax (transductive)"}
CURVES = (
    ("t2v", "rank", "text to video, reranked"),
    ("v2t", "rank", "video to text, reranked"),
    ("t2v", "sim_rank", "text to video, cosine"),
    ("v2t", "sim_rank", "video to text, cosine"),
)
CURVE_WIDTH, CURVE_HEIGHT = 640, 260

Ranks = npt.NDArray[np.int64]


def page(
    result: Mapping[str, Any],
    table: pa.Table,
    gallery: Gallery,
    scores: Scores,
    frames_of: FrameReader | None,
    count: int,
    order: OrderResult | None = None,
) -> str:
    """Render the report page.

    Args:
        result: Metrics, intervals and protocol, as in `metrics.json`.
        table: Ranks from `rank_table`.
        gallery: Captions and videos that were scored.
        scores: Candidates, scores and ranks of both directions.
        frames_of: Reads frames of a video; None if no videos are at hand.
        count: Number of captions to show with frames of their top-ranked videos.
        order: Scores of pairs of captions that differ only in the order of events; None without.
    """
    ranks = {
        (direction, column): _ranks(table, direction, column) for direction, column, _ in CURVES
    }
    return render_page(
        "pipelines.evaluate",
        {
            "result": result,
            "partial": any(name.startswith("partial/") for name in result["metrics"]),
            "rows": list(_metric_rows(result)),
            "recalls": RECALL_AT,
            "orders": _order_rows(result),
            "order_kinds": ["all pairs", *_order_kinds(result)],
            "order_samples": [] if order is None else _order_samples(gallery, order, frames_of),
            "curves": [
                {"label": label, "points": _points(found), "number": number}
                for number, (direction, column, label) in enumerate(CURVES)
                if (found := ranks[direction, column]) is not None
            ],
            "width": CURVE_WIDTH,
            "height": CURVE_HEIGHT,
            "most_k": MOST_K,
            "histograms": [
                {"label": label, "counts": _histogram(found)}
                for direction, column, label in CURVES[: 2 if scores.t2v.reranked else 4]
                if (found := ranks[direction, column]) is not None
            ],
            "moved": _moved(table, scores),
            "hardest": _hardest(table, {one["clip_id"] for one in result["missing"]}, scores),
            "samples": _samples(gallery, scores, frames_of, count),
            "frames": FRAMES,
            "has_frames": frames_of is not None,
            "edge": EDGE,
        },
    )


def _ranks(table: pa.Table, direction: str, column: str) -> Ranks | None:
    if table[column].null_count:
        return None
    is_wanted = np.array(table["direction"].to_pylist()) == direction
    return table[column].to_numpy()[is_wanted]


def _metric_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each kind of score and direction."""
    metrics, intervals = result["metrics"], result["intervals"]
    names = [f"R{k}" for k in RECALL_AT] + ["Rmean", "MdR", "MnR"]
    rows = []
    for partial in ("", "partial/"):
        for kind, kind_label in KINDS.items():
            for direction, label in DIRECTIONS.items():
                prefix = f"{partial}{kind}{direction}/"
                if f"{prefix}R1" not in metrics:
                    continue
                rows.append(
                    {
                        "label": f"{label}, {kind_label}",
                        "prefix": prefix,
                        "figures": [
                            {
                                "name": f"{prefix}{name}",
                                "value": metrics[f"{prefix}{name}"],
                                "interval": intervals.get(f"{prefix}{name}"),
                            }
                            for name in names
                        ],
                    }
                )
    return rows


def _order_kinds(result: Mapping[str, Any]) -> list[str]:
    """Return the kinds of pairs of captions that differ in the order of events."""
    of_kind = f"{ORDER_ACCURACY}_"
    found = (name.partition(of_kind)[2] for name in result["metrics"])
    return sorted({kind for kind in found if kind})


def _order_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row of order-pair accuracies for each kind of score."""
    rows = []
    names = [ORDER_ACCURACY, *(f"{ORDER_ACCURACY}_{kind}" for kind in _order_kinds(result))]
    for partial in ("", "partial/"):
        for kind, label in (("", "with matching"), ("sim/", "cosine only")):
            prefix = f"{partial}{kind}"
            if f"{prefix}{ORDER_ACCURACY}" not in result["metrics"]:
                continue
            figures = [
                {
                    "value": result["metrics"][f"{prefix}{name}"],
                    "interval": result["intervals"].get(f"{prefix}{name}"),
                }
                for name in names
            ]
            rows.append({"label": f"{partial.replace('/', ': ')}{label}", "figures": figures})
    return rows


def _order_samples(
    gallery: Gallery, order: OrderResult, frames_of: FrameReader | None
) -> list[dict[str, Any]]:
    """Return pairs of captions spread evenly over all, each with frames of its video."""
    video_of = {clip_id: video for video, clip_id in enumerate(gallery.clip_ids)}
    samples = []
    for pair in order.examples(EXAMPLES):
        video = video_of[pair.clip_id]
        at_hand = frames_of is not None and gallery.places[video] is not None
        samples.append(
            {
                "pair": pair,
                "success": float(
                    order_success(np.array(pair.score), np.array(pair.counterpart_score))
                ),
                "picture": _strip(frames_of(video)) if frames_of is not None and at_hand else None,
            }
        )
    return samples


def _points(ranks: Ranks) -> str:
    """Return the recall curve as points of an SVG polyline."""
    recalls = [float(np.mean(ranks <= k)) for k in range(1, MOST_K + 1)]
    step = CURVE_WIDTH / (MOST_K - 1)
    return " ".join(
        f"{number * step:.1f},{CURVE_HEIGHT * (1 - recall):.1f}"
        for number, recall in enumerate(recalls)
    )


def _histogram(ranks: Ranks) -> dict[str, int]:
    edges = [*RANK_EDGES, np.inf]
    counts = np.histogram(ranks, bins=edges)[0].tolist()
    labels = [_bar(low, high) for low, high in zip(edges[:-1], edges[1:], strict=True)]
    # Empty bars at the end are left out.
    last = max(number for number, count in enumerate(counts) if count)
    return dict(zip(labels[: last + 1], counts[: last + 1], strict=True))


def _bar(low: float, high: float) -> str:
    if high == np.inf:
        return f"{low:.0f} or more"
    return f"{low:.0f}" if high == low + 1 else f"{low:.0f}-{high - 1:.0f}"


def _moved(table: pa.Table, scores: Scores) -> dict[str, Any] | None:
    """Return the captions whose ranks reranking changed most; None without reranking."""
    if scores.t2v.reranked is None:
        return None
    before, after = scores.t2v.similarity.ranks, scores.t2v.reranked.ranks
    # On a log scale, so that a change near the top counts more than one far down.
    change = np.log(before) - np.log(after)
    captions = table["caption"].slice(0, len(before)).to_pylist()
    ids = table["clip_id"].slice(0, len(before)).to_pylist()

    def listed(order: npt.NDArray[np.intp]) -> list[dict[str, Any]]:
        return [
            {
                "caption": captions[row],
                "clip_id": ids[row],
                "before": int(before[row]),
                "after": int(after[row]),
            }
            for row in order[:EXAMPLES].tolist()
        ]

    up = np.flatnonzero(change > 0)
    down = np.flatnonzero(change < 0)
    return {
        "up": len(up),
        "down": len(down),
        "same": len(before) - len(up) - len(down),
        "helped": listed(up[np.argsort(-change[up], kind="stable")]),
        "hurt": listed(down[np.argsort(change[down], kind="stable")]),
    }


def _hardest(table: pa.Table, missing: set[str], scores: Scores) -> list[dict[str, Any]]:
    """Return captions not ranked first at the end, those with the worst rank by cosine first."""
    cosine, best = scores.t2v.similarity.ranks, scores.t2v.best
    ids_of_texts = table["clip_id"].slice(0, len(cosine)).to_pylist()
    there = np.array([clip_id not in missing for clip_id in ids_of_texts])
    rows = np.flatnonzero(there & (best.ranks > 1))
    order = rows[np.argsort(-cosine[rows], kind="stable")][:EXAMPLES]
    captions, ids = table["caption"], table["clip_id"]
    return [
        {
            "caption": captions[row].as_py(),
            "clip_id": ids[row].as_py(),
            "cosine": int(cosine[row]),
            "rank": int(best.ranks[row]),
        }
        for row in order.tolist()
    ]


def _samples(
    gallery: Gallery, scores: Scores, frames_of: FrameReader | None, count: int
) -> list[dict[str, Any]]:
    """Return captions spread evenly over all, each with its five top-ranked videos."""
    best = scores.t2v.best
    samples = []
    for caption in spread(len(gallery.captions), count):
        right = int(gallery.video_of_caption[caption])
        samples.append(
            {
                "caption": gallery.captions[caption],
                "clip_id": gallery.clip_ids[right],
                "rank": int(best.ranks[caption]),
                "videos": [
                    {
                        "clip_id": gallery.clip_ids[video],
                        "score": float(best.scores[caption, place]),
                        "right": video == right,
                        "picture": None
                        if frames_of is None or gallery.places[video] is None
                        else _strip(frames_of(video)),
                    }
                    for place, video in enumerate(best.candidates[caption, :TOP].tolist())
                    if np.isfinite(best.scores[caption, place])
                ],
            }
        )
    return samples


def _strip(frames: npt.NDArray[np.uint8]) -> str:
    """Return the frames of a clip side by side as a base64-encoded JPEG."""
    strip = Image.new("RGB", (len(frames) * EDGE, EDGE))
    for place, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize((EDGE, EDGE)), (place * EDGE, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
