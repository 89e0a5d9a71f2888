"""Benchmarks of video question answering, and published results of classification on them.

Published tables sometimes state 72,824 and 13,160 questions: these are 72,821 and 13,157, padded to
a multiple of 8 GPUs. Figures that a language model judged are not listed, since they measure
something else and were often computed on the validation files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stgt.errors import SettingError

AnswerBenchmarkName = Literal["msrvtt_qa", "msvd_qa"]

TASK = "video question answering"
"""Task of an evaluation of answers, as its `metrics.json` states it."""
ANSWERS = "answers.parquet"
"""File with all answers in the output folder of such an evaluation."""
JUDGED_EXACTLY = "exact match with the annotated answer, case ignored"
"""How answers are judged here, as the protocol states it."""
CLASSIFICATION = "classification over an answer vocabulary"
GENERATION = "generated, by ranking the likelihoods"


@dataclass(frozen=True)
class PublishedAccuracy:
    """A published result of classification, in percent."""

    system: str
    accuracy: float
    source: str
    by_type: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerBenchmark:
    """A test split of questions."""

    name: AnswerBenchmarkName
    title: str
    split: str
    questions: int
    answers: int
    """Number of answers in the published vocabulary."""
    made_from: str
    """Annotation files that contain the split, for error messages."""
    published: tuple[PublishedAccuracy, ...] = ()

    def check(self, questions: int, where: str) -> None:
        """Check that a manifest holds the questions of the split.

        Raises:
            SettingError: Their number differs.
        """
        if questions != self.questions:
            raise SettingError(
                f"{self.name}: expected {self.questions:,} questions, found {questions:,} in "
                f"{where}; make the manifest from {self.made_from}, or use the benchmark `any`"
            )


ANSWER_BENCHMARKS: dict[str, AnswerBenchmark] = {
    one.name: one
    for one in (
        AnswerBenchmark(
            name="msrvtt_qa",
            title="MSRVTT-QA",
            split="test split",
            questions=72_821,
            answers=1500,
            made_from="test.jsonl of MSRVTT-QA (--format msrvtt_qa)",
            published=(
                PublishedAccuracy(
                    "ALPRO",
                    42.12,
                    "log in ALPRO's repository",
                    {"what": 36.05, "who": 52.24, "how": 85.67, "where": 42.8, "when": 78.88},
                ),
            ),
        ),
        AnswerBenchmark(
            name="msvd_qa",
            title="MSVD-QA",
            split="test split",
            questions=13_157,
            answers=2423,
            made_from="test_qa.json of MSVD-QA with youtube_mapping.txt (--format msvd_qa), or "
            "ALPRO's test.jsonl (--format alpro)",
            published=(
                PublishedAccuracy(
                    "ALPRO",
                    45.91,
                    "log in ALPRO's repository",
                    {"what": 37.02, "who": 58.59, "how": 81.62, "where": 46.43, "when": 72.41},
                ),
            ),
        ),
    )
}
