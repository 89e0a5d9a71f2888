"""Compares evaluations of video question answering by a paired bootstrap over clips.

Retrieval and question answering are never compared. Answers that were classified and answers that
were generated are, and the page says so. Answers that were judged by anything other than an exact
match with the annotated answer, such as by a language model, are refused.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.answer_benchmarks import (
    ANSWER_BENCHMARKS,
    ANSWERS,
    CLASSIFICATION,
    JUDGED_EXACTLY,
    TASK,
    PublishedAccuracy,
)
from pipelines.common import storage, tracking
from pipelines.common.config import TrackingConfig
from pipelines.compare.evaluations import METRICS, Difference, EvaluationResult
from stgt.errors import STGTError
from stgt.question_answering.accuracy import resampled_accuracy
from stgt.retrieval.bootstrap import interval

COLUMNS = ["clip_id", "question", "answer"]
"""Columns in which evaluations of the same questions are equal."""
RETRIEVAL = "text-video retrieval"
NOT_COMPARED = frozenset(
    {"checkpoint", "model", "missing videos", "outside the vocabulary", "judging"}
)


@dataclass(frozen=True)
class AnswersResult:
    """A finished evaluation of question answering."""

    name: str
    result: dict[str, Any]
    answers: pa.Table

    @property
    def answering(self) -> str:
        """How the model answers, such as by classification over a vocabulary."""
        return self.result["protocol"].get("answering", "not recorded")

    def check(self) -> None:
        """Check that the answers were judged by exact match.

        Raises:
            STGTError: They were judged in another way.
        """
        judging = self.result["protocol"].get("judging", "not recorded")
        if judging != JUDGED_EXACTLY:
            raise STGTError(
                f"{self.name}: its answers were judged by {judging}; only answers judged by "
                f"{JUDGED_EXACTLY} can be compared, so leave this evaluation out"
            )


def read_answers_result(run: str, config: TrackingConfig) -> AnswersResult | None:
    """Read an evaluation of answers from its folder or from its MLflow run.

    Args:
        run: Output folder of jobs.evaluate, or id of its run in MLflow.
        config: The MLflow server or file that has the run.

    Returns:
        The evaluation, or None if there is none at this place, or one of retrieval.

    Raises:
        STGTError: The answers were judged by anything other than an exact match.
        MlflowUnavailableError: MLflow cannot be used.
    """
    folder = storage.resolve(run)
    if storage.exists(storage.join(folder, METRICS)):
        result = storage.read_json(storage.join(folder, METRICS))
        if not _is_of_answers(result):
            return None
        answers = storage.read_table(storage.join(folder, ANSWERS))
        found = AnswersResult(storage.name_of(folder), result, answers)
    elif storage.exists(folder):
        return None
    else:
        name, files = tracking.read_files(config, run, (METRICS,))
        result = json.loads(files[METRICS])
        if not _is_of_answers(result):
            return None
        _, files = tracking.read_files(config, run, (ANSWERS,))
        answers = pq.read_table(io.BytesIO(files[ANSWERS]))
        found = AnswersResult(f"{name} ({run[:8]})", result, answers)
    found.check()
    return found


def _is_of_answers(result: Any) -> bool:
    return isinstance(result, dict) and result.get("task") == TASK


def check_same_task(evaluations: Sequence[AnswersResult | EvaluationResult]) -> None:
    """Check that all evaluations are of the same task.

    Raises:
        STGTError: Some are of retrieval and some of question answering.
    """
    first = evaluations[0]
    tasks = [TASK if isinstance(one, AnswersResult) else RETRIEVAL for one in evaluations]
    for one, task in zip(evaluations, tasks, strict=True):
        if task != tasks[0]:
            raise STGTError(
                f"{first.name} is an evaluation of {tasks[0]}, {one.name} one of {task}: their "
                "results measure different things; compare evaluations of one task"
            )


def published_accuracies(evaluations: Sequence[AnswersResult]) -> tuple[PublishedAccuracy, ...]:
    """Return published results of classification; none if an evaluation generates its answers."""
    benchmark = ANSWER_BENCHMARKS.get(evaluations[0].result["benchmark"])
    if benchmark is None or not all(
        one.answering.startswith(CLASSIFICATION) for one in evaluations
    ):
        return ()
    return benchmark.published


def same_questions(one: AnswersResult, other: AnswersResult) -> bool:
    """Return whether two evaluations answered the same questions, in the same order."""
    return one.answers.select(COLUMNS).equals(other.answers.select(COLUMNS))


def answer_differences(
    one: AnswersResult, other: AnswersResult, resamples: int
) -> list[Difference]:
    """Return the differences of `other` from `one` in every accuracy, in points.

    Both must have answered the same questions. They use the same resamples of the clips, which
    makes the differences paired.
    """
    drawn = [_resampled(each, resamples) for each in (one, other)]
    found: list[Difference] = []
    for name in drawn[0]:
        low, high = interval(drawn[1][name] - drawn[0][name])
        difference = other.result["metrics"][name] - one.result["metrics"][name]
        verdict = "no difference shown"
        if low > 0 or high < 0:
            verdict = "better" if difference > 0 else "worse"
        found.append(
            Difference(metric=name, difference=difference, low=low, high=high, verdict=verdict)
        )
    return found


def _resampled(one: AnswersResult, resamples: int) -> dict[str, Any]:
    clips = np.unique(np.array(one.answers["clip_id"].to_pylist()), return_inverse=True)[1]
    is_right = np.array(one.answers["is_right"].to_pylist(), dtype=bool)
    return resampled_accuracy(is_right, one.answers["type"].to_pylist(), clips, resamples)


def answer_protocol_differences(one: AnswersResult, other: AnswersResult) -> dict[str, str]:
    """Describe the parts of the protocol in which two evaluations differ, by topic."""
    mine, theirs = one.result["protocol"], other.result["protocol"]
    return {
        name: f"{mine.get(name, 'none')} ({one.name}); {theirs.get(name, 'none')} ({other.name})"
        for name in sorted((mine.keys() | theirs.keys()) - NOT_COMPARED)
        if mine.get(name) != theirs.get(name)
    }
