"""Types of questions, as published results report them: by the first word of the question."""

from __future__ import annotations

QUESTION_TYPES = ("what", "who", "how", "where", "when")
"""The types of MSRVTT-QA and MSVD-QA, in the order of published tables."""
OTHER = "other"
"""Type of a question that begins with another word."""


def question_type(question: str) -> str:
    """Return the first word of a question if it is one of `QUESTION_TYPES`, else `other`.

    In the published files, this equals their column `answer_type`.
    """
    first = question.strip().lower().split(maxsplit=1)
    return first[0] if first and first[0] in QUESTION_TYPES else OTHER
