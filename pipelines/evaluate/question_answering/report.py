"""The report of an evaluation of answers as a self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipelines.artifacts.answer_benchmarks import AnswerBenchmark
from pipelines.common.pages import render_page
from stgt.question_answering.accuracy import ACCURACY, metric_of
from stgt.question_answering.question_types import OTHER, QUESTION_TYPES

EDGE = 72
"""Edge length of a frame, in pixels."""
FRAMES = 4
QUALITY = 80
CONFUSIONS = 20

FramesOf = Callable[[str], npt.NDArray[np.uint8]]
"""Returns frames [FRAMES, size, size, 3] uint8 of a clip that is not missing, by its id."""


def page(
    result: Mapping[str, Any],
    table: pa.Table,
    frames_of: FramesOf,
    count: int,
    benchmark: AnswerBenchmark | None,
) -> str:
    """Render the report page.

    Args:
        result: Metrics, intervals and protocol, as in `metrics.json`.
        table: The answers, as `stages.SCHEMA` describes them.
        frames_of: Reads frames of a clip.
        count: Number of questions to show with frames.
        benchmark: The benchmark; its published results are shown.
    """
    return render_page(
        "pipelines.evaluate.question_answering",
        {
            "result": result,
            "rows": list(_metric_rows(result, table)),
            "samples": list(_samples(table, frames_of, count)),
            "confusions": _confusions(table),
            "frames": FRAMES,
            "edge": EDGE,
            "published": [] if benchmark is None else benchmark.published,
        },
    )


def _metric_rows(result: Mapping[str, Any], table: pa.Table) -> Iterator[dict[str, Any]]:
    counted = Counter(table["type"].to_pylist())
    counted["all"] = len(table)
    names = {"all": ACCURACY, **{one: metric_of(one) for one in (*QUESTION_TYPES, OTHER)}}
    for label, name in names.items():
        if name in result["metrics"]:
            yield {
                "type": label,
                "questions": counted[label],
                "value": result["metrics"][name],
                "interval": result["intervals"].get(name),
            }


def _samples(table: pa.Table, frames_of: FramesOf, count: int) -> Iterator[dict[str, Any]]:
    """Yield questions spread evenly over those whose clip is there."""
    there = np.flatnonzero(~np.array(table["is_missing"].to_pylist(), dtype=bool))
    chosen = np.linspace(0, len(there) - 1, min(count, len(there))).round().astype(int)
    for number in there[chosen].tolist():
        row = table.slice(number, 1).to_pylist()[0]
        row["best"] = list(zip(row["best"], row["probabilities"], strict=True))
        row["picture"] = _picture(frames_of(row["clip_id"]))
        yield row


def _picture(frames: npt.NDArray[np.uint8]) -> str:
    """Return frames side by side as a JPEG in base 64."""
    strip = Image.new("RGB", (EDGE * len(frames), EDGE))
    for place, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize((EDGE, EDGE)), (place * EDGE, 0))
    buffer = io.BytesIO()
    strip.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _confusions(table: pa.Table) -> list[tuple[str, str, int]]:
    """Return the most frequent pairs of an annotated and another predicted answer."""
    pairs = Counter(
        (row["answer"], row["best"][0])
        for row in table.select(["answer", "best", "is_right"]).to_pylist()
        if row["best"] and not row["is_right"]
    )
    return [(*pair, count) for pair, count in pairs.most_common(CONFUSIONS)]
