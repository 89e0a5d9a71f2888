"""Answer vocabularies in the form of the published files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stgt.errors import SettingError
from stgt.question_answering.vocabulary import NO_ANSWER, AnswerVocabulary, check_size


def test_published_vocabulary_is_read_with_its_classes(annotations_dir: Path) -> None:
    path = annotations_dir / "msrvtt_qa" / "train_ans2label.json"

    vocabulary = AnswerVocabulary.from_json(path.read_bytes(), str(path))

    assert len(vocabulary) == 1500
    published = json.loads(path.read_text())
    assert all(vocabulary.label_of(answer) == label for answer, label in published.items())
    assert all(vocabulary.answer_of(label) == answer for answer, label in published.items())


def test_answers_outside_the_vocabulary_have_no_class() -> None:
    vocabulary = AnswerVocabulary(("cat", "dog"))

    assert vocabulary.label_of(" Dog ") == 1
    assert vocabulary.label_of("horse") == NO_ANSWER


def test_a_class_beyond_the_vocabulary_is_no_answer() -> None:
    vocabulary = AnswerVocabulary(("cat", "dog"))

    assert vocabulary.answer_of(1) == "dog"
    assert vocabulary.answer_of(2) is None
    assert vocabulary.answer_of(NO_ANSWER) is None


def test_a_vocabulary_survives_writing_and_reading() -> None:
    vocabulary = AnswerVocabulary(("two", "cat", "dog"))

    assert AnswerVocabulary.from_json(vocabulary.to_json(), "file") == vocabulary
    assert AnswerVocabulary.from_json('["two", "cat", "dog"]', "file") == vocabulary


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("{}", "expected an object"),
        ("[]", "expected an object"),
        ('"cat"', "expected an object"),
        ('{"cat": 0, "dog": 2}', "numbers 0 to 1"),
        ('{"cat": 0, "dog": 0}', "numbers 0 to 1"),
        ('{"cat": 0, "dog": true}', "numbers 0 to 1"),
        ('{"cat": "0"}', "numbers 0 to 0"),
        ('{"cat": 0, "Cat": 1}', "more than once"),
        ('["cat", "cat"]', "more than once"),
    ],
)
def test_other_files_are_refused_by_name(text: str, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        AnswerVocabulary.from_json(text, "answers.json")


def test_most_frequent_answers_are_kept() -> None:
    answers = ["dog", "cat", "Dog", "two", "cat", "dog", "ape"]

    assert AnswerVocabulary.most_frequent(answers, 3).answers == ("ape", "cat", "dog")


def test_vocabulary_must_have_the_size_of_the_classifier() -> None:
    vocabulary = AnswerVocabulary(("cat", "dog"))

    check_size(vocabulary, 2, "file")
    check_size(vocabulary, 1500, "file")  # published code makes no smaller classifier
    for classes in (1, 3, 1501):
        with pytest.raises(SettingError, match=f"file: .* 2 answers, .* {classes} classes"):
            check_size(vocabulary, classes, "file")
