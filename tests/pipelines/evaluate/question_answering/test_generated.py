"""The generated questions: what they ask, and how they are read back."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.artifacts.questions import by_clip, read_answers, read_questions
from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.video.synthetic import dataset, questions
from pipelines.video.synthetic.scenes import Scene, all_scenes
from stgt.errors import ManifestError

MOVES_FIRST = Scene("red", "circle", "gray", ("moves left", "grows"))


def test_questions_of_a_scene() -> None:
    asked = [(one.subject, one.question, one.answer) for one in questions.questions_of(MOVES_FIRST)]

    assert asked == [
        ("color", "what color is the circle", "red"),
        ("shape", "what is the red shape", "circle"),
        ("shape", "what shape is red", "circle"),
        ("shape", "what shape is on the gray background", "circle"),
        ("shape", "what shape moves left first", "circle"),
        ("shape", "what shape grows last", "circle"),
        ("shape", "what is the shape that moves left and then grows", "circle"),
        ("direction", "where does the circle go first", "left"),
        ("order", "what does the circle do last", "grows"),
        ("count", "how many times does the circle move", "one"),
    ]


def test_direction_is_asked_only_of_a_shape_that_moves_first() -> None:
    scene = Scene("red", "circle", "gray", ("grows", "moves left"))

    assert "direction" not in {one.subject for one in questions.questions_of(scene)}


def test_every_question_tells_its_subject_and_has_an_answer_in_the_vocabulary() -> None:
    vocabulary = questions.answer_vocabulary()

    for scene in all_scenes():
        for one in questions.questions_of(scene):
            assert questions.subject_of(one.question) == one.subject
            assert vocabulary.label_of(one.answer) >= 0
            assert one.answer not in one.question.split()


def test_questions_go_through_a_manifest(tmp_path: Path) -> None:
    videos = dataset.plan_videos(num_train=6, num_val=2, seed=1)["train"]
    folder = tmp_path / "videos"
    for video in videos:
        (folder / video.page_dir).mkdir(parents=True, exist_ok=True)
        (folder / video.page_dir / f"{video.video_id}.mp4").touch()
    count = questions.write_questions(str(tmp_path / "qa.jsonl"), videos)
    run_manifest(
        ManifestConfig(
            format="msrvtt_qa",
            annotations=(str(tmp_path / "qa.jsonl"),),
            videos=(str(folder),),
            output=str(tmp_path / "qa.parquet"),
        )
    )

    found = by_clip(read_questions(str(tmp_path / "qa.parquet")))

    assert sum(map(len, found.values())) == count
    for video in videos:
        asked = [(one.question, one.answer) for one in found[video.video_id]]
        expected = [(one.question, one.answer) for one in questions.questions_of(video.scene)]
        assert sorted(asked) == sorted(expected)


@pytest.mark.slow
def test_published_annotations_are_read_with_their_answers(
    tmp_path: Path, annotations_dir: Path
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "video6513.mp4").touch()
    run_manifest(
        ManifestConfig(
            format="msrvtt_qa",
            annotations=(str(annotations_dir / "msrvtt_qa" / "val.jsonl"),),
            videos=(str(tmp_path / "videos"),),
            output=str(tmp_path / "val.parquet"),
        )
    )
    vocabulary = read_answers(str(annotations_dir / "msrvtt_qa" / "train_ans2label.json"))

    found = read_questions(str(tmp_path / "val.parquet"))

    assert len(found) == 12_278
    outside = sum(vocabulary.label_of(one.answer) < 0 for one in found)
    assert outside / len(found) == pytest.approx(0.070, abs=0.0005)
    assert {one.type for one in found} == {"what", "who", "how", "where", "when"}


def test_a_manifest_without_questions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "rows.jsonl").write_text('{"video": "a.mp4", "caption": "a cat"}\n')
    run_manifest(
        ManifestConfig(
            format="generic",
            annotations=(str(tmp_path / "rows.jsonl"),),
            videos=(str(tmp_path),),
            output=str(tmp_path / "captions.parquet"),
        )
    )

    with pytest.raises(ManifestError, match="contains no questions"):
        read_questions(str(tmp_path / "captions.parquet"))


def test_questions_without_answers_are_listed(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "rows.json").write_text(
        '[{"video": "a.mp4", "question": "what runs", "answer": "cat", "question_id": 7},'
        ' {"video": "a.mp4", "question": "who runs", "answer": " ", "question_id": 8}]'
    )
    run_manifest(
        ManifestConfig(
            format="lavis",
            annotations=(str(tmp_path / "rows.json"),),
            videos=(str(tmp_path),),
            output=str(tmp_path / "qa.parquet"),
        )
    )

    with pytest.raises(ManifestError, match=r"1 questions have no text or no answer \(8 about a"):
        read_questions(str(tmp_path / "qa.parquet"))


def test_a_missing_answer_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"answers\.json does not exist"):
        read_answers(str(tmp_path / "answers.json"))
