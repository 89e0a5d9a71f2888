"""The tiny model learns to answer, from the quickstart's checkpoint, within five minutes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.questions import read_questions
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.tasks import evaluate_task
from pipelines.quickstart.config import QuickstartConfig
from pipelines.quickstart.run import run_quickstart
from pipelines.synthetic import dataset, questions
from pipelines.train import recipes
from pipelines.train.run import run_train
from tests.helpers.questions import manifest_of_questions

MINUTES = 5
BETTER = 20
"""Points by which the answers must be more often right than the most frequent answer."""


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(2400)
def test_answers_beat_the_most_frequent_answer(ray_cluster: None, tmp_path: Path) -> None:
    """Overall, of colors and of shapes. Direction, order and count are only printed.

    The most frequent answer is that of each subject in training, which is better than one answer
    for all questions.
    """
    folder = tmp_path / "quickstart"
    config = QuickstartConfig(output=str(folder))
    run_quickstart(config, connect=lambda _: None)  # the fixture has started Ray
    plan = dataset.plan_videos(config.train_videos, config.val_videos, config.seed)
    asked = {
        split: manifest_of_questions(videos, str(folder / "videos"), tmp_path / split)
        for split, videos in plan.items()
    }
    answers = tmp_path / "answers.json"
    questions.write_answers(str(answers))
    recipe = recipes.RECIPES["qa_msrvtt_stgt_tiny"](
        (str(folder / "clips" / "train"),),
        str(tmp_path / "run"),
        str(folder / "stage2"),
        str(folder / "vocab.txt"),
        questions=asked["train"],  # type: ignore[call-arg]
        answers=str(answers),
    )

    recipe = replace(recipe, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    seconds = run_train(recipe)["seconds"]
    output = tmp_path / "evaluation"
    evaluate_task(
        EvaluateConfig(
            data=str(folder / "clips" / "val"),
            checkpoint=recipe.output,
            questions=asked["val"],
            output=str(output),
            tracking=recipe.tracking,
        )
    )

    frequent: dict[str, Counter[str]] = {subject: Counter() for subject in questions.SUBJECTS}
    for one in read_questions(asked["train"]):
        frequent[questions.subject_of(one.question)][one.answer] += 1
    guess = {subject: counted.most_common(1)[0][0] for subject, counted in frequent.items()}
    rows = pq.read_table(output / "answers.parquet").to_pylist()
    texts = [row["question"] for row in rows]
    is_right = [row["is_right"] for row in rows]
    guessed = [guess[questions.subject_of(row["question"])] == row["answer"] for row in rows]
    found = questions.accuracy_by_subject(texts, is_right)
    base = questions.accuracy_by_subject(texts, guessed)
    print(f"{seconds:.0f} s; {found}, the most frequent answer {base}")
    assert 100 * np.mean(is_right) >= 100 * np.mean(guessed) + BETTER
    for subject in ("color", "shape"):
        assert found[subject] >= base[subject] + BETTER
    assert seconds <= 60 * MINUTES
