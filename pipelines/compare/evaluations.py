"""Reads finished evaluations and compares two of them by a paired bootstrap over videos."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.common import storage, tracking
from pipelines.common.config import TrackingConfig
from pipelines.compare.earlier_wording import in_current_words
from stgt.errors import STGTError
from stgt.retrieval.bootstrap import interval
from stgt.retrieval.gallery import resampled_metrics
from stgt.retrieval.metrics import is_better
from stgt.retrieval.order_pairs import (
    ORDER_ACCURACY,
    order_success,
    resampled_order_accuracy,
)

METRICS = "metrics.json"
RANKS = "ranks.parquet"
KINDS = {"": "rank", "sim/": "sim_rank"}
"""Maps each metric prefix to the column with its ranks."""
ORDER_PAIRS = "order_pairs.parquet"
"""Scores of captions and counterparts that differ in the order of events."""
ORDER_SCORES = {"": "score", "sim/": "sim"}
"""Maps each metric prefix to the beginning of the columns with its scores."""
ORDER_COLUMNS = ["clip_id", "kind", "caption", "counterpart"]
NOT_CHECKED = "not checked"
NOT_COMPARED = frozenset(
    {"checkpoint", "missing videos", "repeated captions", "leakage", "order pairs"}
)
"""Parts of a protocol that are not compared: they do not affect comparability, or are checked
separately."""
MISSING_VIDEOS = "missing videos"
GALLERY = "gallery"
PARTIAL = "partial/"


class Difference(TypedDict):
    """Difference between two evaluations in one metric."""

    metric: str
    difference: float
    low: float
    high: float
    """Upper end of the 95% confidence interval from the paired bootstrap; `low` is the lower."""
    verdict: str
    """One of "better", "worse" and "no difference shown"."""


@dataclass(frozen=True)
class EvaluationResult:
    """A finished evaluation."""

    name: str
    result: dict[str, Any]
    ranks: pa.Table
    order_pairs: pa.Table | None = None
    """Scores of captions and counterparts that differ in the order of events."""

    @property
    def source(self) -> str:
        """The checkpoint, or the file of embeddings."""
        return self.result["checkpoint"] or self.result["embedding_file"]

    @property
    def leakage(self) -> str:
        """Whether test clips were looked for in the training data, and what was found."""
        return self.result["protocol"].get("leakage", NOT_CHECKED)

    @property
    def is_partial(self) -> bool:
        """Whether missing videos were left out of the metrics."""
        return any(name.startswith(PARTIAL) for name in self.result["metrics"])

    @property
    def reranking(self) -> str:
        """How candidates were reranked, and how many."""
        return self.result["protocol"].get("reranking", "not recorded")

    def metric(self, name: str) -> float | None:
        """Return a metric by its name without `partial/`; None if it was not computed."""
        prefix = PARTIAL if self.is_partial else ""
        return self.result["metrics"].get(f"{prefix}{name}")


def read_evaluation(run: str, config: TrackingConfig) -> EvaluationResult:
    """Read an evaluation from its folder or from its MLflow run.

    Args:
        run: Output folder of jobs.evaluate, or id of its run in MLflow.
        config: The MLflow server or file that has the run.

    Raises:
        STGTError: There is no such evaluation, or it is unfinished.
        MlflowUnavailableError: MLflow cannot be used.
    """
    if storage.exists(storage.join(storage.resolve(run), METRICS)):
        folder = storage.resolve(run)
        result = storage.read_json(storage.join(folder, METRICS))
        if not isinstance(result, dict) or "benchmark" not in result:
            raise STGTError(f"{run} is not an evaluation: its {METRICS} has other content")
        if "task" in result:
            raise STGTError(f"{run} is an evaluation of {result['task']}, not of retrieval")
        ranks = storage.read_table(storage.join(folder, RANKS))
        order = storage.join(folder, ORDER_PAIRS)
        pairs = storage.read_table(order) if storage.exists(order) else None
        return _evaluation(storage.name_of(folder), result, ranks, pairs)
    if storage.exists(storage.resolve(run)):
        raise STGTError(
            f"{run} holds no {METRICS}: it is not an evaluation, or the evaluation is unfinished"
        )
    name, files = tracking.read_files(config, run, (METRICS, RANKS))
    ranks = pq.read_table(io.BytesIO(files[RANKS]))
    result, pairs = json.loads(files[METRICS]), None
    if any(ORDER_ACCURACY in metric for metric in result["metrics"]):
        _, files = tracking.read_files(config, run, (ORDER_PAIRS,))
        pairs = pq.read_table(io.BytesIO(files[ORDER_PAIRS]))
    return _evaluation(f"{name} ({run[:8]})", result, ranks, pairs)


def _evaluation(
    name: str, result: dict[str, Any], ranks: pa.Table, order_pairs: pa.Table | None
) -> EvaluationResult:
    if judging := result["protocol"].get("judging"):
        raise STGTError(
            f"{name}: its figures were judged by {judging}; such figures depend on the judge and "
            "are not comparable with ranks, so leave this evaluation out"
        )
    current = {**result, "protocol": in_current_words(result["protocol"])}
    return EvaluationResult(name, current, ranks, order_pairs)


def same_searches(one: EvaluationResult, other: EvaluationResult) -> bool:
    """Return whether two evaluations scored the same captions and videos, in the same order."""
    columns = ["direction", "clip_id", "caption"]
    return one.ranks.select(columns).equals(other.ranks.select(columns))


def paired_differences(
    one: EvaluationResult, other: EvaluationResult, resamples: int
) -> list[Difference]:
    """Return the differences of `other` from `one` in every metric that both have.

    Both must have scored the same captions and videos.
    """
    found: list[Difference] = []
    partial = PARTIAL if one.is_partial or other.is_partial else ""
    drawn_of = [_resampled(evaluation, resamples) for evaluation in (one, other)]
    if same_order_pairs(one, other):
        for drawn, evaluation in zip(drawn_of, (one, other), strict=True):
            drawn |= _resampled_order(evaluation, resamples)
    for name in drawn_of[0]:
        before, after = one.metric(name), other.metric(name)
        if name not in drawn_of[1] or before is None or after is None:
            continue
        low, high = interval(drawn_of[1][name] - drawn_of[0][name])
        verdict = "no difference shown"
        if low > 0 or high < 0:
            verdict = "better" if is_better(name, after - before) else "worse"
        found.append(
            Difference(
                metric=f"{partial}{name}",
                difference=after - before,
                low=low,
                high=high,
                verdict=verdict,
            )
        )
    return found


def _resampled(one: EvaluationResult, resamples: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return the metrics of an evaluation in each bootstrap resample.

    Evaluations of the same gallery use the same resamples, which makes differences paired.
    """
    direction = np.array(one.ranks["direction"].to_pylist())
    ids = np.array(one.ranks["clip_id"].to_pylist())
    videos = ids[direction == "v2t"]
    order = np.argsort(videos)
    texts = ids[direction == "t2v"]
    owner = order[np.searchsorted(videos, texts, sorter=order)]
    drawn: dict[str, npt.NDArray[np.float64]] = {}
    for prefix, column in KINDS.items():
        if one.ranks[column].null_count:
            continue
        ranks = one.ranks[column].to_numpy()
        found = resampled_metrics(
            ranks[direction == "t2v"], ranks[direction == "v2t"], owner, resamples
        )
        drawn |= {f"{prefix}{name}": values for name, values in found.items()}
    return drawn


def same_order_pairs(one: EvaluationResult, other: EvaluationResult) -> bool:
    """Return whether two evaluations scored the same captions and counterparts, in one order."""
    tables = [each.order_pairs for each in (one, other)]
    if tables[0] is None or tables[1] is None:
        return False
    return tables[0].select(ORDER_COLUMNS).equals(tables[1].select(ORDER_COLUMNS))


def _resampled_order(one: EvaluationResult, resamples: int) -> dict[str, npt.NDArray[np.float64]]:
    """Return the order-pair accuracies of an evaluation in each bootstrap resample of its clips."""
    table = one.order_pairs
    assert table is not None, "checked by same_order_pairs"
    kinds, clip_ids = (table[name].to_pylist() for name in ("kind", "clip_id"))
    drawn: dict[str, npt.NDArray[np.float64]] = {}
    for prefix, column in ORDER_SCORES.items():
        right, wrong = table[f"{column}_caption"], table[f"{column}_counterpart"]
        if right.null_count:
            continue
        success = order_success(right.to_numpy(), wrong.to_numpy())
        found = resampled_order_accuracy(success, kinds, clip_ids, resamples)
        drawn |= {f"{prefix}{name}": values for name, values in found.items()}
    return drawn


def protocol_differences(one: EvaluationResult, other: EvaluationResult) -> dict[str, str]:
    """Describe the parts of the protocol in which two evaluations differ, by topic."""
    mine, theirs = one.result["protocol"], other.result["protocol"]
    found = {
        name: f"{mine.get(name, 'none')} ({one.name}); {theirs.get(name, 'none')} ({other.name})"
        for name in sorted((mine.keys() | theirs.keys()) - NOT_COMPARED)
        if mine.get(name) != theirs.get(name)
        # Evaluations of earlier versions do not say as which split their gallery was recognized.
        and not (name == GALLERY and GALLERY not in mine.keys() & theirs.keys())
    }
    gone = [{row["clip_id"] for row in each.result["missing"]} for each in (one, other)]
    if gone[0] != gone[1]:
        found[MISSING_VIDEOS] = (
            f"{len(gone[0])} ({one.name}); {len(gone[1])} ({other.name}); "
            f"{len(gone[0] & gone[1])} in common"
        )
    return found
