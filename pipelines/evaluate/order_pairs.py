"""Scores pairs of captions that differ only in the order or direction of events.

Legend: P pairs, V videos, T different texts.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.common import storage
from pipelines.evaluate.gallery import Gallery, spread
from stgt.errors import STGTError
from stgt.retrieval.bootstrap import interval
from stgt.retrieval.order_pairs import (
    MISSING,
    order_accuracy,
    order_success,
    resampled_order_accuracy,
)

TABLE = "order_pairs.parquet"
"""File with the scores of all pairs in the output folder."""
COLUMNS = ("clip_id", "caption", "counterpart", "kind")
NAMED = 5
KIND = re.compile(r"[A-Za-z0-9_.-]{1,100}")
"""What a kind may be. It becomes a part of the names of metrics, in which MLflow allows little."""

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
Score = Callable[[IntArray], npt.NDArray[np.floating]]
"""Maps pairs (text, video) [n, 2] to scores [n] of any precision."""


@dataclass(frozen=True)
class OrderPairs:
    """P pairs of a caption and its counterpart, each of a video of a gallery."""

    videos: IntArray
    """[P] int64, position of each pair's video in the gallery."""
    clip_ids: list[str]
    kinds: list[str]
    texts: list[str]
    """T different texts."""
    captions: IntArray
    """[P] int64, the text that is true of the video."""
    counterparts: IntArray
    """[P] int64, the text that is not."""

    def __len__(self) -> int:
        return len(self.clip_ids)

    def of_present(self, present: npt.NDArray[np.bool_]) -> OrderPairs | None:
        """Return the pairs of videos that can be used, [V] bool; None if there are none."""
        kept = np.flatnonzero(present[self.videos])
        if len(kept) == 0:
            return None
        return replace(
            self,
            videos=self.videos[kept],
            clip_ids=[self.clip_ids[pair] for pair in kept],
            kinds=[self.kinds[pair] for pair in kept],
            captions=self.captions[kept],
            counterparts=self.counterparts[kept],
        )


@dataclass(frozen=True)
class OrderExample:
    """A pair to show, with the scores of both captions."""

    clip_id: str
    kind: str
    caption: str
    """The true caption."""
    counterpart: str
    score: float
    """Score of the true caption."""
    counterpart_score: float


@dataclass(frozen=True)
class OrderResult:
    """Scores of all pairs, and what they amount to."""

    table: pa.Table
    """Columns clip_id, kind, caption, counterpart, sim_caption, sim_counterpart (cosine), and
    score_caption, score_counterpart (with matching, null without)."""
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]

    def examples(self, count: int) -> list[OrderExample]:
        """Return up to `count` pairs of usable videos, spread evenly over the table.

        Their scores are those with matching, or the cosines of a model that does not match.
        """
        name = "sim" if self.table["score_caption"].null_count else "score"
        right = self.table[f"{name}_caption"].to_numpy()
        usable = np.flatnonzero(~np.isneginf(right))
        chosen = usable[spread(len(usable), count)]
        return [
            OrderExample(
                clip_id=row["clip_id"],
                kind=row["kind"],
                caption=row["caption"],
                counterpart=row["counterpart"],
                score=row[f"{name}_caption"],
                counterpart_score=row[f"{name}_counterpart"],
            )
            for row in self.table.take(chosen).to_pylist()
        ]


def read_order_pairs(uri: str, gallery: Gallery) -> OrderPairs:
    """Read a table of pairs for the clips of a gallery.

    Raises:
        STGTError: The table is missing or damaged, lacks columns, is empty, contains values that
            are not texts or kinds that cannot be parts of names, or names clips that are not in
            the gallery.
    """
    if not storage.exists(uri):
        raise STGTError(f"order_pairs: {uri} does not exist; give a table (.parquet)")
    if not storage.is_file(uri):
        raise STGTError(f"order_pairs: {uri} is a folder; give a table (.parquet)")
    try:
        table = storage.read_table(uri)
        names = table.column_names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # such as a missing permission; Arrow's own errors have no number
        raise STGTError(
            f"order_pairs: {uri} is not a Parquet file, or is damaged: {error}"
        ) from error
    if lacking := [name for name in COLUMNS if name not in names]:
        raise STGTError(
            f"order_pairs: {uri} lacks the columns {', '.join(lacking)}; it needs "
            f"{', '.join(COLUMNS)}"
        )
    rows = _rows(uri, table)
    if not rows:
        raise STGTError(f"order_pairs: {uri} contains no pairs")
    if bad := [number for number, row in enumerate(rows) if not all(row[n] for n in COLUMNS)]:
        raise STGTError(f"order_pairs: row {bad[0]} of {uri} has an empty column; fill it in")
    if bad := [number for number, row in enumerate(rows) if not KIND.fullmatch(row["kind"])]:
        raise STGTError(
            f"order_pairs: row {bad[0]} of {uri} has the kind {rows[bad[0]]['kind']!r}, but a kind "
            "is a part of the names of metrics; use up to 100 of the characters A to Z, a to z, 0 "
            "to 9, '_', '-' and '.'"
        )
    video_of = {clip_id: video for video, clip_id in enumerate(gallery.clip_ids)}
    unknown = list(dict.fromkeys(r["clip_id"] for r in rows if r["clip_id"] not in video_of))
    if unknown:
        raise STGTError(
            f"order_pairs: {uri} has pairs of {len(unknown)} clips that are not in the gallery "
            f"({', '.join(unknown[:NAMED])}); use the pairs of the gallery's clips"
        )
    texts = list(dict.fromkeys(row[name] for row in rows for name in COLUMNS[1:3]))
    number = {text: place for place, text in enumerate(texts)}
    return OrderPairs(
        videos=np.array([video_of[row["clip_id"]] for row in rows]),
        clip_ids=[row["clip_id"] for row in rows],
        kinds=[row["kind"] for row in rows],
        texts=texts,
        captions=np.array([number[row["caption"]] for row in rows]),
        counterparts=np.array([number[row["counterpart"]] for row in rows]),
    )


def _rows(uri: str, table: pa.Table) -> list[dict[str, str]]:
    """Return the rows of a table: whole numbers as ids become texts, empty places empty ones."""
    for name in COLUMNS:
        kind = table.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        tests = [pa.types.is_string, pa.types.is_large_string, pa.types.is_null]
        if name == "clip_id":
            tests.append(pa.types.is_integer)
        if not any(test(kind) for test in tests):
            raise STGTError(
                f"order_pairs: the column {name} of {uri} has type {kind}; save it as text"
            )
    try:
        rows = table.select(list(COLUMNS)).to_pylist()
    except ValueError as error:
        raise STGTError(
            f"order_pairs: {uri} contains a text that is not UTF-8 ({error}); save it as UTF-8"
        ) from error
    return [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in rows
    ]


def cosines(videos: FloatArray, texts: FloatArray, pairs: IntArray) -> FloatArray:
    """Return the cosine [n] of pairs (text, video) [n, 2]: that of their best two vectors.

    Args:
        videos: [V, Q, E] of unit length.
        texts: [T, E] or [T, C, E] of unit length.
        pairs: [n, 2] int64.
    """
    vectors = texts[:, None] if texts.ndim == 2 else texts
    return np.array(
        [(vectors[text] @ videos[video].T).max() for text, video in pairs.tolist()],
        dtype=np.float32,
    )


def score_order_pairs(
    pairs: OrderPairs,
    present: npt.NDArray[np.bool_],
    cosine: Score,
    fused: Score | None,
    resamples: int,
) -> OrderResult:
    """Score all pairs and compute the accuracies with their intervals.

    Args:
        pairs: The pairs.
        present: [V] bool, False for videos that cannot be used; their pairs count as failures.
        cosine: Scores by cosine.
        fused: Scores that the model ranks by after matching; None if it does not match.
        resamples: Number of bootstrap resamples; 0 skips intervals.

    Returns:
        Metrics `sim/order/accuracy` and so on by cosine, and `order/accuracy` and so on with
        matching, each also for every kind of pairs.
    """
    there = present[pairs.videos]
    asked = np.concatenate(
        [
            np.stack([texts[there], pairs.videos[there]], axis=1)
            for texts in (pairs.captions, pairs.counterparts)
        ]
    )
    columns: dict[str, pa.Array] = {
        "clip_id": pa.array(pairs.clip_ids),
        "kind": pa.array(pairs.kinds),
        "caption": pa.array([pairs.texts[text] for text in pairs.captions]),
        "counterpart": pa.array([pairs.texts[text] for text in pairs.counterparts]),
    }
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for prefix, name, score in (("sim/", "sim", cosine), ("", "score", fused)):
        names = f"{name}_caption", f"{name}_counterpart"
        if score is None:
            columns |= {one: pa.nulls(len(pairs), pa.float32()) for one in names}
            continue
        scores = score(asked).reshape(2, -1)
        # Rounded to fewer bits, different scores would become ties.
        both = np.full((2, len(pairs)), MISSING, dtype=scores.dtype)
        both[:, there] = scores
        columns |= {one: pa.array(values) for one, values in zip(names, both, strict=True)}
        success = order_success(both[0], both[1])
        found = order_accuracy(success, pairs.kinds)
        metrics |= {f"{prefix}{one}": value for one, value in found.items()}
        if resamples:
            drawn = resampled_order_accuracy(success, pairs.kinds, pairs.clip_ids, resamples)
            intervals |= {f"{prefix}{one}": interval(values) for one, values in drawn.items()}
    return OrderResult(pa.table(columns), metrics, intervals)
