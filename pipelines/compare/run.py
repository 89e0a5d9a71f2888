"""Compares evaluations by paired bootstrap and lists published results for reference."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts import published_results
from pipelines.common import storage, tracking
from pipelines.common.output_folder import write_config
from pipelines.common.pages import render_page
from pipelines.compare.config import CompareConfig
from pipelines.compare.earlier_wording import in_current_words
from stgt.errors import STGTError
from stgt.retrieval.bootstrap import interval
from stgt.retrieval.gallery import resampled_metrics
from stgt.retrieval.metrics import is_better

logger = logging.getLogger(__name__)

METRICS = "metrics.json"
RANKS = "ranks.parquet"
REPORT = "compare.html"
JSON = "compare.json"
KINDS = {"": "rank", "sim/": "sim_rank"}
"""Maps each metric prefix to the column with its ranks."""
SHOWN = tuple(f"{way}/{name}" for way in ("t2v", "v2t") for name in ("R1", "R5", "R10", "MdR"))
NOT_COMPARED = frozenset({"checkpoint", "missing videos", "repeated captions"})
"""Parts of a protocol that are not compared: they do not affect comparability, or are checked
separately."""
PARTIAL = "partial/"

IntArray = npt.NDArray[np.int64]


class Difference(TypedDict):
    """Difference between two evaluations in one metric."""

    metric: str
    difference: float
    low: float
    high: float
    """Upper end of the 95% confidence interval from the paired bootstrap; `low` is the lower."""
    verdict: str
    """One of "better", "worse" and "no difference shown"."""


class CompareSummary(TypedDict):
    """Result of `run_compare`."""

    runs: list[str]
    metrics: dict[str, dict[str, float]]
    reranking: dict[str, str]
    """How each run reranks, with its number of candidates, by name of the run."""
    differences: dict[str, list[Difference]]
    """Differences of each run except the first from the first, by name of the run."""
    protocols_differ: list[str]
    published: list[str]
    report: str | None


@dataclass(frozen=True)
class EvaluationResult:
    """A finished evaluation."""

    name: str
    result: dict[str, Any]
    ranks: pa.Table

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


def run_compare(config: CompareConfig) -> CompareSummary:
    """Compare all evaluations with the first one.

    Raises:
        STGTError: An evaluation does not exist, is unfinished, or is of another benchmark.
    """
    evaluations = _with_distinct_names([_read(run, config) for run in config.runs], config.runs)
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.result["benchmark"] != first.result["benchmark"]:
            raise STGTError(
                f"{first.name} was evaluated on {first.result['title']}, {other.name} on "
                f"{other.result['title']}: results on different benchmarks are not comparable"
            )
    differences = {}
    for other in evaluations[1:]:
        if _same_searches(first, other):
            differences[other.name] = _differences(first, other, config.resamples)
        else:
            logger.warning(
                "%s and %s used different captions or videos: no paired differences are computed",
                first.name,
                other.name,
            )
    differing = _protocol_differences(evaluations)
    for line in differing:
        logger.warning("protocols differ: %s", line)
    beside = _published(evaluations)
    summary = CompareSummary(
        runs=[one.name for one in evaluations],
        metrics={one.name: one.result["metrics"] for one in evaluations},
        reranking={one.name: one.reranking for one in evaluations},
        differences=differences,
        protocols_differ=differing,
        published=[_in_words(one) for one in beside],
        report=None,
    )
    for line in _lines(evaluations, differences, beside):
        logger.info("%s", line)
    if config.output is not None:
        output = storage.resolve(config.output)
        summary["report"] = storage.join(output, REPORT)
        storage.write_json(storage.join(output, JSON), summary)
        page = _page(evaluations, differences, differing, beside)
        storage.write_bytes(summary["report"], page.encode())
        write_config(output, "compare", config)
    return summary


def _read(run: str, config: CompareConfig) -> EvaluationResult:
    """Read an evaluation from its folder or from its MLflow run."""
    if storage.exists(storage.join(storage.resolve(run), METRICS)):
        folder = storage.resolve(run)
        result = storage.read_json(storage.join(folder, METRICS))
        if not isinstance(result, dict) or "benchmark" not in result:
            raise STGTError(f"{run} is not an evaluation: its {METRICS} has other content")
        ranks = storage.read_table(storage.join(folder, RANKS))
        return _evaluation(storage.name_of(folder), result, ranks)
    if storage.exists(storage.resolve(run)):
        raise STGTError(
            f"{run} holds no {METRICS}: it is not an evaluation, or the evaluation is unfinished"
        )
    name, files = tracking.read_files(config.tracking, run, (METRICS, RANKS))
    ranks = pq.read_table(io.BytesIO(files[RANKS]))
    return _evaluation(f"{name} ({run[:8]})", json.loads(files[METRICS]), ranks)


def _evaluation(name: str, result: dict[str, Any], ranks: pa.Table) -> EvaluationResult:
    current = {**result, "protocol": in_current_words(result["protocol"])}
    return EvaluationResult(name, current, ranks)


def _with_distinct_names(
    evaluations: list[EvaluationResult], runs: tuple[str, ...]
) -> list[EvaluationResult]:
    """Make names unique: if two folders have the same name, all get the full path as name."""
    names = [one.name for one in evaluations]
    if len(set(names)) == len(names):
        return evaluations
    if len(set(runs)) < len(runs):
        raise STGTError(f"an evaluation is given twice in {', '.join(runs)}")
    return [replace(one, name=run) for one, run in zip(evaluations, runs, strict=True)]


def _same_searches(one: EvaluationResult, other: EvaluationResult) -> bool:
    columns = ["direction", "clip_id", "caption"]
    return one.ranks.select(columns).equals(other.ranks.select(columns))


def _differences(
    one: EvaluationResult, other: EvaluationResult, resamples: int
) -> list[Difference]:
    found: list[Difference] = []
    partial = PARTIAL if one.is_partial or other.is_partial else ""
    drawn_of = [_resampled(evaluation, resamples) for evaluation in (one, other)]
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


def _protocol_differences(evaluations: list[EvaluationResult]) -> list[str]:
    """Describe the parts of the protocol in which evaluations differ from the first."""
    first = evaluations[0]
    lines = []
    for other in evaluations[1:]:
        mine, theirs = first.result["protocol"], other.result["protocol"]
        lines += [
            f"{name}: {mine.get(name, 'none')} ({first.name}); "
            f"{theirs.get(name, 'none')} ({other.name})"
            for name in sorted((mine.keys() | theirs.keys()) - NOT_COMPARED)
            if mine.get(name) != theirs.get(name)
        ]
        gone = [{row["clip_id"] for row in one.result["missing"]} for one in (first, other)]
        if gone[0] != gone[1]:
            lines.append(
                f"missing videos: {len(gone[0])} ({first.name}); {len(gone[1])} ({other.name}); "
                f"{len(gone[0] & gone[1])} in common"
            )
    return lines


def _published(evaluations: list[EvaluationResult]) -> list[published_results.PublishedResult]:
    """Return published results under the same protocol; none if an evaluation is partial."""
    if any(one.is_partial for one in evaluations):
        logger.warning(
            "published results are not shown because they cover all videos and an evaluation is "
            "partial"
        )
        return []
    benchmark = evaluations[0].result["benchmark"]
    found = published_results.results_of(benchmark)
    others = [
        one for one in published_results.RESULTS if one.benchmark == benchmark and one not in found
    ]
    if others:
        logger.info(
            "%d published results are left out: they use other clips or their protocol is unknown",
            len(others),
        )
    return found


def _in_words(one: published_results.PublishedResult) -> str:
    kind = "zero-shot" if one.zero_shot else "fine-tuned"
    recalls = ", ".join(
        f"R@{k} {value:.1f}" for k, value in zip((1, 5, 10), one.recall, strict=True) if value
    )
    if one.v2t_recall_at_1 is not None:
        recalls += f", video-to-text R@1 {one.v2t_recall_at_1:.1f}"
    caveat = f"; {one.caveat}" if one.caveat else ""
    return f"{one.name} ({kind}): {recalls} ({one.source}{caveat})"


def _lines(
    evaluations: list[EvaluationResult],
    differences: dict[str, list[Difference]],
    beside: list[published_results.PublishedResult],
) -> list[str]:
    lines = [f"{evaluations[0].result['title']}: {evaluations[0].result['protocol']['protocol']}"]
    for one in evaluations:
        partial = "PARTIAL " if one.is_partial else ""
        figures = [
            f"{kind}{name} {value:.1f}"
            for kind in KINDS
            for name in SHOWN[:3]
            if (value := one.metric(f"{kind}{name}")) is not None
        ]
        lines.append(f"{partial}{one.name}: {'  '.join(figures)}")
        lines.append(f"{one.name}: reranking: {one.reranking}")
    for name, found in differences.items():
        ways = ("t2v", "sim/t2v", f"{PARTIAL}t2v", f"{PARTIAL}sim/t2v")
        shown = [one for one in found if one["metric"].rpartition("/")[0] in ways]
        lines += [
            f"{name} vs. {evaluations[0].name}: {one['metric']} {one['difference']:+.1f} "
            f"[{one['low']:+.1f}, {one['high']:+.1f}] {one['verdict']}"
            for one in shown
            if one["metric"].endswith(("/R1", "/R5", "/R10"))
        ]
    lines += [f"published: {_in_words(one)}" for one in beside]
    return lines


def _page(
    evaluations: list[EvaluationResult],
    differences: dict[str, list[Difference]],
    differing: list[str],
    beside: list[published_results.PublishedResult],
) -> str:
    names = [
        f"{kind}{name}"
        for kind in KINDS
        for name in SHOWN
        if any(one.metric(f"{kind}{name}") is not None for one in evaluations)
    ]
    return render_page(
        "pipelines.compare",
        {
            "title": evaluations[0].result["title"],
            "protocol": evaluations[0].result["protocol"]["protocol"],
            "names": names,
            "evaluations": [
                {
                    "name": one.name,
                    "partial": one.is_partial,
                    "checkpoint": one.result["checkpoint"],
                    "reranking": one.reranking,
                    "figures": [one.metric(name) for name in names],
                }
                for one in evaluations
            ],
            "first": evaluations[0].name,
            "differences": differences,
            "differing": differing,
            "published": beside,
        },
    )
