"""Builds the rows of question-answering datasets, which store questions as extras of a clip."""

from __future__ import annotations

from typing import Any

from pipelines.manifest.formats.files import AmbiguousVideo
from pipelines.manifest.formats.rows import AnnotationSource, ClipRow


def question_row(
    row: dict[str, Any],
    number: int,
    video_id: str,
    video_uri: str | AmbiguousVideo,
    source: AnnotationSource,
    name: str,
) -> ClipRow:
    """Build a row with one question; merging the rows of a clip joins their questions.

    If the annotations have no question ids, the row number, counted from 0, is used.
    """
    question = {
        "question": str(row["question"]),
        "answer": str(row["answer"]),
        "question_id": row.get("question_id", row.get("id", number - 1)),
    }
    if row.get("answer_type"):
        question["answer_type"] = row["answer_type"]
    return ClipRow(
        clip_id=video_id,
        video_id=video_id,
        video_uri=video_uri,
        captions=[],
        split=source.split or "train",
        source=name,
        extras={"questions": [question]},
    )
