"""Questions about the clips of a manifest, with their answers.

`jobs.manifest` stores the questions of a question-answering data set beside its clips, in the
column `extras` of the manifest. Training and evaluation read them from there and find the clips by
their ids, in any clip store or manifest that contains them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipelines.artifacts.manifest import ManifestRows, check_manifest
from pipelines.common import storage
from stgt.errors import ManifestError
from stgt.question_answering.question_types import question_type
from stgt.question_answering.vocabulary import AnswerVocabulary

EXTRA = "questions"
"""Name of the list of questions in a manifest's column `extras`."""
ROWS_AT_A_TIME = 1024
SHOWN = 3


@dataclass(frozen=True)
class Question:
    """A question about a clip."""

    clip_id: str
    question_id: str
    """As in the annotations; the row number if they have none, which repeats between files."""
    question: str
    answer: str

    @property
    def type(self) -> str:
        """Type of the question, by its first word."""
        return question_type(self.question)


def read_questions(uri: str) -> list[Question]:
    """Return all questions of a manifest, in the order of its clips.

    Args:
        uri: A manifest that was made from question-answering annotations.

    Raises:
        ManifestError: The manifest cannot be used, has no questions, or has questions without a
            text or an answer.
    """
    uri = storage.resolve(uri)
    check_manifest(uri)
    found = list(_read(uri))
    if not found:
        raise ManifestError(
            f"manifest {uri} contains no questions; make it from question-answering annotations, "
            "such as with python -m jobs.manifest --format msrvtt_qa"
        )
    empty = [one for one in found if not one.question.strip() or not one.answer.strip()]
    if empty:
        named = ", ".join(f"{one.question_id} about {one.clip_id}" for one in empty[:SHOWN])
        raise ManifestError(
            f"manifest {uri}: {len(empty)} questions have no text or no answer ({named}); remove "
            "them from the annotations and make the manifest again"
        )
    return found


def _read(uri: str) -> Iterator[Question]:
    rows = ManifestRows(uri)
    for first in range(0, len(rows), ROWS_AT_A_TIME):
        for row in rows.read(first, first + ROWS_AT_A_TIME, ["clip_id", "extras"]):
            for one in json.loads(row["extras"]).get(EXTRA, []):
                yield Question(
                    clip_id=row["clip_id"],
                    question_id=str(one["question_id"]),
                    question=str(one["question"]),
                    answer=str(one["answer"]),
                )


def by_clip(questions: Sequence[Question]) -> Mapping[str, list[Question]]:
    """Return the questions of each clip, in their order."""
    found: dict[str, list[Question]] = {}
    for one in questions:
        found.setdefault(one.clip_id, []).append(one)
    return found


def read_answers(uri: str) -> AnswerVocabulary:
    """Read an answer vocabulary, local or s3://.

    Raises:
        ManifestError: The file does not exist.
        SettingError: The file has another form.
    """
    uri = storage.resolve(uri)
    if not storage.exists(uri):
        raise ManifestError(
            f"answer vocabulary {uri} does not exist; give a JSON file that maps answers to "
            "classes, such as the published train_ans2label.json"
        )
    return AnswerVocabulary.from_json(storage.read_bytes(uri), uri)
