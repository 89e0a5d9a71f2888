"""The answers that a classifier chooses from, in the form of the published `train_ans2label.json`.

The published vocabularies hold the answers of the training split: 1,500 for MSRVTT-QA and 2,423 for
MSVD-QA. An answer outside the vocabulary cannot be predicted, so it counts as wrong in an
evaluation, and its question is left out of training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from stgt.errors import SettingError

FILE = "answers.json"
"""Name of the vocabulary in the folder of a model that answers questions."""
NO_ANSWER = -1
"""Class of an answer outside the vocabulary."""
PUBLISHED_CLASSES = 1500
"""Published code gives a classifier at least this many classes, also for smaller vocabularies."""
SHOWN = 5


@dataclass(frozen=True)
class AnswerVocabulary:
    """Answers in the order of their classes."""

    answers: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.answers:
            raise SettingError("the answer vocabulary is empty; give a file with answers")
        if repeated := [answer for answer, n in Counter(self.answers).items() if n > 1]:
            raise SettingError(
                f"the answer vocabulary lists {', '.join(map(repr, repeated[:SHOWN]))} more than "
                "once; list every answer once"
            )

    def __len__(self) -> int:
        return len(self.answers)

    @cached_property
    def _labels(self) -> dict[str, int]:
        return {answer: label for label, answer in enumerate(self.answers)}

    def label_of(self, answer: str) -> int:
        """Return the class of an answer, or `NO_ANSWER` if it is outside the vocabulary.

        Spaces around an answer and capital letters are ignored, since published annotations are
        lower case.
        """
        return self._labels.get(normalized(answer), NO_ANSWER)

    def answer_of(self, label: int) -> str | None:
        """Return the answer of a class, or None for a class beyond the vocabulary."""
        return self.answers[label] if 0 <= label < len(self.answers) else None

    def to_json(self) -> str:
        """Return the vocabulary as a JSON object, answer -> class."""
        return json.dumps(self._labels, indent=1)

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> AnswerVocabulary:
        """Read a vocabulary from a JSON object, answer -> class, or a list of answers.

        Args:
            text: Contents of the file.
            where: Name of the file, for messages.

        Raises:
            SettingError: The text has another form, or its classes are not 0 to n - 1, each once.
        """
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SettingError(f"answer vocabulary {where} is not JSON: {error}") from error
        if isinstance(found, list) and found:
            return cls(tuple(normalized(str(answer)) for answer in found))
        if not isinstance(found, dict) or not found:
            raise SettingError(
                f"answer vocabulary {where}: expected an object that maps answers to classes, such "
                'as {"cat": 0, "dog": 1}'
            )
        labels = list(found.values())
        if not all(type(label) is int for label in labels) or sorted(labels) != list(
            range(len(labels))
        ):
            raise SettingError(
                f"answer vocabulary {where}: the classes of its {len(labels)} answers must be the "
                f"numbers 0 to {len(labels) - 1}, each used once"
            )
        return cls(tuple(normalized(answer) for answer in sorted(found, key=found.__getitem__)))

    @classmethod
    def most_frequent(cls, answers: Iterable[str], most: int) -> AnswerVocabulary:
        """Return the most frequent answers, in alphabetical order; ties go to the earlier one.

        Args:
            answers: Answer of each training question.
            most: Maximum number of answers to keep.
        """
        counted = Counter(normalized(answer) for answer in answers)
        chosen = sorted(counted, key=lambda answer: (-counted[answer], answer))[:most]
        return cls(tuple(sorted(chosen)))


def normalized(answer: str) -> str:
    """Return an answer in lower case, without spaces around it."""
    return answer.strip().lower()


def check_size(vocabulary: AnswerVocabulary, num_answers: int, where: str) -> None:
    """Check that a vocabulary belongs to a classifier.

    Published code gives a classifier at least 1,500 classes. The classes of such a classifier that
    are beyond its vocabulary are wrong answers; any other difference means the wrong file.

    Raises:
        SettingError: The vocabulary has another size than the classifier.
    """
    size = len(vocabulary)
    if size == num_answers or (size < num_answers == PUBLISHED_CLASSES):
        return
    raise SettingError(
        f"{where}: the answer vocabulary has {size} answers, but the model's classifier has "
        f"{num_answers} classes; use the vocabulary that the model was trained with"
    )
