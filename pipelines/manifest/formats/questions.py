"""What question answering has in common: questions are extras of the clip they are about."""

from __future__ import annotations

from typing import Any

from pipelines.manifest.formats.rows import AnnotationSource, ClipRow


def question_row(
    row: dict[str, Any],
    number: int,
    video_id: str,
    video_uri: str,
    source: AnnotationSource,
    name: str,
) -> ClipRow:
    """A clip with one question; merging rows of the clip joins the lists.

    Question ids that the annotations lack are the number of the row, counted from 0.
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
