"""Compares evaluations by paired bootstrap and lists published results for reference."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TypedDict

from pipelines.artifacts import published_results
from pipelines.common import storage
from pipelines.common.output_folder import write_config
from pipelines.common.pages import render_page
from pipelines.compare.answers import (
    AnswersResult,
    answer_differences,
    answer_protocol_differences,
    check_same_task,
    published_accuracies,
    read_answers_result,
    same_questions,
)
from pipelines.compare.config import CompareConfig
from pipelines.compare.evaluations import (
    KINDS,
    PARTIAL,
    Difference,
    EvaluationResult,
    paired_differences,
    protocol_differences,
    read_evaluation,
    same_searches,
)
from stgt.errors import STGTError
from stgt.retrieval.order_pairs import ORDER_ACCURACY

logger = logging.getLogger(__name__)

REPORT = "compare.html"
JSON = "compare.json"
WAYS_LOGGED = ("t2v", "sim/t2v", "order", "sim/order")
SHOWN = tuple(f"{way}/{name}" for way in ("t2v", "v2t") for name in ("R1", "R5", "R10", "MdR"))


class CompareSummary(TypedDict):
    """Result of `run_compare`."""

    runs: list[str]
    metrics: dict[str, dict[str, float]]
    reranking: dict[str, str]
    """How each run reranks, with its number of candidates, by name of the run; for question
    answering, how each run answers."""
    differences: dict[str, list[Difference]]
    """Differences of each run except the first from the first, by name of the run."""
    protocols_differ: list[str]
    published: list[str]
    report: str | None


def run_compare(config: CompareConfig) -> CompareSummary:
    """Compare all evaluations with the first one.

    Raises:
        STGTError: An evaluation does not exist, is unfinished, or is of another benchmark.
    """
    everything: list[EvaluationResult | AnswersResult] = _with_distinct_names(
        [
            read_answers_result(run, config.tracking) or read_evaluation(run, config.tracking)
            for run in config.runs
        ],
        config.runs,
    )
    check_same_task(everything)
    for other in everything[1:]:
        if other.result["benchmark"] != everything[0].result["benchmark"]:
            raise STGTError(
                f"{everything[0].name} was evaluated on {everything[0].result['title']}, "
                f"{other.name} on {other.result['title']}: results on different benchmarks are not "
                "comparable"
            )
    if answers := [one for one in everything if isinstance(one, AnswersResult)]:
        return _compare_answers(config, answers)
    evaluations = [one for one in everything if isinstance(one, EvaluationResult)]
    first = evaluations[0]
    _refuse_other_galleries(evaluations)
    differences = {}
    for other in evaluations[1:]:
        if same_searches(first, other):
            differences[other.name] = paired_differences(first, other, config.resamples)
        else:
            logger.warning(
                "%s and %s used different captions or videos: no paired differences are computed",
                first.name,
                other.name,
            )
    differing = [
        f"{topic}: {what}"
        for other in evaluations[1:]
        for topic, what in protocol_differences(first, other).items()
    ]
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
    _write(config, summary, lambda: _page(evaluations, differences, differing, beside))
    return summary


def _refuse_other_galleries(evaluations: list[EvaluationResult]) -> None:
    """Check that no two evaluations are of galleries that were recognized as different splits.

    Raises:
        STGTError: Two are.
    """
    first = evaluations[0]
    for other in evaluations[1:]:
        names = [one.result.get("gallery") for one in (first, other)]
        if first.is_partial or other.is_partial or None in names or names[0] == names[1]:
            continue
        raise STGTError(
            f"{first.name} was evaluated on {names[0]}, {other.name} on {names[1]}: results on "
            "different test splits are not comparable"
        )


def _write(config: CompareConfig, summary: CompareSummary, page: Callable[[], str]) -> None:
    """Write the page and the summary, if there is a folder for them."""
    if config.output is None:
        return
    output = storage.resolve(config.output)
    summary["report"] = storage.join(output, REPORT)
    storage.write_json(storage.join(output, JSON), summary)
    storage.write_bytes(summary["report"], page().encode())
    write_config(output, "compare", config)


def _compare_answers(config: CompareConfig, evaluations: list[AnswersResult]) -> CompareSummary:
    """Compare evaluations of question answering on one benchmark with the first one."""
    first = evaluations[0]
    differences = {}
    for other in evaluations[1:]:
        if same_questions(first, other):
            differences[other.name] = answer_differences(first, other, config.resamples)
        else:
            logger.warning(
                "%s and %s answered different questions: no paired differences are computed",
                first.name,
                other.name,
            )
    differing = [
        f"{topic}: {what}"
        for other in evaluations[1:]
        for topic, what in answer_protocol_differences(first, other).items()
    ]
    for line in differing:
        logger.warning("protocols differ: %s", line)
    beside = published_accuracies(evaluations)
    summary = CompareSummary(
        runs=[one.name for one in evaluations],
        metrics={one.name: one.result["metrics"] for one in evaluations},
        reranking={one.name: one.answering for one in evaluations},
        differences=differences,
        protocols_differ=differing,
        published=[f"{one.system}: {one.accuracy:.2f} % ({one.source})" for one in beside],
        report=None,
    )
    for one in evaluations:
        figures = [f"{name} {value:.2f}" for name, value in one.result["metrics"].items()]
        logger.info("%s: %s; %s", one.name, one.answering, "  ".join(figures))
    for name, found in differences.items():
        for one in found:
            logger.info(
                "%s vs. %s: %s %+.2f [%+.2f, %+.2f] %s",
                name,
                first.name,
                one["metric"],
                one["difference"],
                one["low"],
                one["high"],
                one["verdict"],
            )
    for line in summary["published"]:
        logger.info("published: %s", line)
    names = list(dict.fromkeys(name for one in evaluations for name in one.result["metrics"]))
    values = {
        "title": first.result["title"],
        "protocol": first.result["protocol"]["protocol"],
        "explained": "Accuracy in percent: of all questions, and by their first word.",
        "detail": "Answering",
        "digits": 2,
        "names": names,
        "evaluations": [
            {
                "name": one.name,
                "partial": False,
                "checkpoint": one.result["checkpoint"],
                "detail": one.answering,
                "figures": [one.result["metrics"].get(name) for name in names],
            }
            for one in evaluations
        ],
        "first": first.name,
        "differences": differences,
        "differing": differing,
        "published": [],
        "published_accuracies": beside,
    }
    _write(config, summary, lambda: render_page("pipelines.compare", values))
    return summary


def _with_distinct_names(
    evaluations: list[EvaluationResult | AnswersResult], runs: tuple[str, ...]
) -> list[EvaluationResult | AnswersResult]:
    """Make names unique: if two folders have the same name, all get the full path as name."""
    names = [one.name for one in evaluations]
    if len(set(names)) == len(names):
        return evaluations
    if len(set(runs)) < len(runs):
        raise STGTError(f"an evaluation is given twice in {', '.join(runs)}")
    return [replace(one, name=run) for one, run in zip(evaluations, runs, strict=True)]


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
            for name in (*SHOWN[:3], ORDER_ACCURACY)
            if (value := one.metric(f"{kind}{name}")) is not None
        ]
        lines.append(f"{partial}{one.name}: {'  '.join(figures)}")
        lines.append(f"{one.name}: reranking: {one.reranking}")
        lines.append(f"{one.name}: leakage of test clips into training data: {one.leakage}")
    for name, found in differences.items():
        ways = [f"{start}{way}" for start in ("", PARTIAL) for way in WAYS_LOGGED]
        shown = [one for one in found if one["metric"].rpartition("/")[0] in ways]
        lines += [
            f"{name} vs. {evaluations[0].name}: {one['metric']} {one['difference']:+.1f} "
            f"[{one['low']:+.1f}, {one['high']:+.1f}] {one['verdict']}"
            for one in shown
            if one["metric"].endswith(("/R1", "/R5", "/R10", ORDER_ACCURACY))
        ]
    lines += [f"published: {_in_words(one)}" for one in beside]
    return lines


def _order_names(evaluations: list[EvaluationResult]) -> list[str]:
    """Return the names of all order-pair accuracies, without those of other scores."""
    names = (name for one in evaluations for name in one.result["metrics"])
    found = {name.removeprefix(PARTIAL) for name in names}
    return sorted(name for name in found if name.startswith(ORDER_ACCURACY))


def _notes(first: EvaluationResult, one: EvaluationResult) -> list[str]:
    """Return what has to stand beside the figures of an evaluation."""
    notes = [f"Leakage of test clips into training data: {one.leakage}"]
    if differing := list(protocol_differences(first, one)):
        notes.append(f"Another protocol than {first.name}: {', '.join(differing)}")
    return notes


def _page(
    evaluations: list[EvaluationResult],
    differences: dict[str, list[Difference]],
    differing: list[str],
    beside: list[published_results.PublishedResult],
) -> str:
    names = [
        f"{kind}{name}"
        for kind in KINDS
        for name in (*SHOWN, *_order_names(evaluations))
        if any(one.metric(f"{kind}{name}") is not None for one in evaluations)
    ]
    return render_page(
        "pipelines.compare",
        {
            "title": evaluations[0].result["title"],
            "protocol": evaluations[0].result["protocol"]["protocol"],
            "explained": "Recalls are in percent. Metrics named sim/ rank by cosine only; the "
            "others are after reranking. Metrics named order/ are the percentage of pairs of "
            "captions, differing only in the order or direction of events, of which the true one "
            "is preferred; chance is 50 %.",
            "detail": "Reranking",
            "digits": 1,
            "names": names,
            "evaluations": [
                {
                    "name": one.name,
                    "partial": one.is_partial,
                    "checkpoint": one.source,
                    "detail": one.reranking,
                    "notes": _notes(evaluations[0], one),
                    "figures": [one.metric(name) for name in names],
                }
                for one in evaluations
            ],
            "first": evaluations[0].name,
            "differences": differences,
            "differing": differing,
            "published": beside,
            "published_accuracies": (),
        },
    )
