"""Questions about the generated clips: color, shape, direction, order and count.

They are written as MSRVTT-QA's JSON lines, so the manifest stage reads them. Colors and shapes can
be seen in any frame. Direction, order and count need several frames in their order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from pipelines.common import storage
from pipelines.video.synthetic.dataset import Video
from pipelines.video.synthetic.scenes import COLOURS, EVENTS, MOVES, SHAPES, Scene
from stgt.question_answering.vocabulary import AnswerVocabulary

Subject = Literal["color", "shape", "direction", "order", "count"]
SUBJECTS: tuple[Subject, ...] = get_args(Subject)

QUESTIONS: dict[Subject, tuple[str, ...]] = {
    "color": ("what color is the {shape}",),
    "shape": (
        "what is the {color} shape",
        "what shape is {color}",
        "what shape is on the {background} background",
        "what shape {first} first",
        "what shape {last} last",
        "what is the shape that {first} and then {last}",
    ),
    "direction": ("where does the {shape} go first",),
    "order": ("what does the {shape} do last",),
    "count": ("how many times does the {shape} move",),
}
"""Questions of each subject. They begin with words by which `subject_of` knows it. Shapes are
harder to see than colors, and are therefore asked about in several ways."""
COUNTS = ("zero", "one", "two")


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene, with its answer."""

    subject: Subject
    question: str
    answer: str


def questions_of(scene: Scene) -> list[SceneQuestion]:
    """Return all questions about a scene.

    The direction is asked only if the shape moves first. The question about the color names the
    shape and the other way around, so that neither answer is in the question.
    """
    first, last = scene.events
    moves = [event for event in scene.events if event in MOVES]
    answers: dict[Subject, str] = {
        "color": scene.colour,
        "shape": scene.shape,
        "order": last,
        "count": COUNTS[len(moves)],
    }
    if first in MOVES:
        answers["direction"] = first.removeprefix("moves ")
    words = {
        "shape": scene.shape,
        "color": scene.colour,
        "background": scene.background,
        "first": first,
        "last": last,
    }
    return [
        SceneQuestion(subject, question.format(**words), answers[subject])
        for subject in SUBJECTS
        if subject in answers
        for question in QUESTIONS[subject]
    ]


def subject_of(question: str) -> Subject:
    """Return the subject of a question that `questions_of` made.

    Raises:
        KeyError: It is another question.
    """
    for subject, questions in QUESTIONS.items():
        if question.startswith(tuple(one.partition(" {")[0] for one in questions)):
            return subject
    raise KeyError(question)


def answer_vocabulary() -> AnswerVocabulary:
    """Return all answers to questions about any scene, in alphabetical order."""
    directions = [event.removeprefix("moves ") for event in MOVES]
    return AnswerVocabulary(tuple(sorted({*COLOURS, *SHAPES, *EVENTS, *directions, *COUNTS})))


def write_questions(uri: str, videos: Sequence[Video]) -> int:
    """Write all questions about videos as MSRVTT-QA's JSON lines, and return their number.

    Args:
        uri: File to write.
        videos: What was rendered.
    """
    lines = [
        {
            "video_id": video.video_id,
            "question": one.question,
            "answer": one.answer,
            "answer_type": one.question.split()[0],
        }
        for video in videos
        for one in questions_of(video.scene)
    ]
    storage.write_bytes(uri, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return len(lines)


def write_answers(uri: str) -> None:
    """Write the answer vocabulary in the form of the published `train_ans2label.json`."""
    storage.write_bytes(uri, answer_vocabulary().to_json().encode())


def accuracy_by_subject(
    questions: Sequence[str], is_right: Sequence[bool]
) -> Mapping[Subject, float]:
    """Return the accuracy of the questions of each subject that occurs, in percent."""
    of = np.array([subject_of(question) for question in questions])
    right = np.asarray(is_right)
    return {
        subject: 100 * float(right[of == subject].mean())
        for subject in SUBJECTS
        if (of == subject).any()
    }
