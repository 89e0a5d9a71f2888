"""Accuracy by type of question, compared with counting one by one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stgt.question_answering.accuracy import accuracy, metric_of, resampled_accuracy
from stgt.question_answering.question_types import question_type


def test_types_of_published_questions_are_their_first_words(annotations_dir: Path) -> None:
    lines = (annotations_dir / "msrvtt_qa" / "val.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    assert len(rows) == 12_278
    assert all(question_type(row["question"]) == row["answer_type"] for row in rows)


@pytest.mark.parametrize(
    ("question", "expected"),
    [("Who runs?", "who"), ("  how many", "how"), ("which one", "other"), ("", "other")],
)
def test_type_is_the_first_word(question: str, expected: str) -> None:
    assert question_type(question) == expected


def test_accuracy_by_hand() -> None:
    is_right = np.array([True, False, False, True, False])
    types = ["what", "what", "who", "other", "what"]

    assert accuracy(is_right, types) == pytest.approx(
        {
            "answers/accuracy": 40.0,
            "answers/accuracy_what": 100 / 3,
            "answers/accuracy_who": 0.0,
            "answers/accuracy_other": 100.0,
        }
    )


def test_accuracy_needs_questions() -> None:
    with pytest.raises(ValueError, match="0 answers and 0 types"):
        accuracy(np.empty(0, dtype=bool), [])


def test_resamples_equal_counting_the_questions_of_every_drawn_video() -> None:
    generator = np.random.default_rng(3)
    questions, videos, resamples = 60, 7, 40
    is_right = generator.random(questions) < 0.4
    types = generator.choice(["what", "who", "when"], size=questions, p=[0.7, 0.27, 0.03]).tolist()
    video_of = generator.integers(videos, size=questions)
    video_of[:videos] = np.arange(videos)

    found = resampled_accuracy(is_right, types, video_of, resamples, seed=5)

    again = np.random.default_rng(5)
    for resample in range(resamples):
        counted: dict[str, list[bool]] = {"answers/accuracy": []}
        for video in again.integers(videos, size=videos).tolist():
            for question in range(questions):
                if video_of[question] == video:
                    counted["answers/accuracy"].append(bool(is_right[question]))
                    counted.setdefault(metric_of(types[question]), []).append(
                        bool(is_right[question])
                    )
        assert found.keys() >= counted.keys()
        for name, values in found.items():
            expected = 100 * np.mean(counted[name]) if counted.get(name) else np.nan
            np.testing.assert_allclose(values[resample], expected)


def test_equal_models_differ_by_nothing_in_every_resample() -> None:
    is_right = np.arange(30) % 3 == 0
    types = ["what"] * 30
    videos = np.arange(30) // 4

    one, other = (resampled_accuracy(is_right, types, videos, 20) for _ in range(2))

    assert (one["answers/accuracy"] == other["answers/accuracy"]).all()
