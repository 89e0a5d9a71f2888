"""The tiny model learns to answer, from the quickstart's checkpoint, within five minutes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.questions import read_questions
from pipelines.common.config import TrackingConfig
from pipelines.evaluate.config import EvaluateConfig
from pipelines.evaluate.tasks import evaluate_task
from pipelines.quickstart.config import QuickstartConfig
from pipelines.quickstart.run import run_quickstart
from pipelines.train import recipes
from pipelines.train.run import run_train
from pipelines.video.synthetic import dataset, questions
from tests.helpers.questions import manifest_of_questions

MINUTES = 5
BETTER = 20
"""Points by which the answers must be more often right than the most frequent answer."""


@dataclass(frozen=True)
class Prepared:
    """A finished quickstart, and questions about its clips."""

    folder: Path
    questions: dict[str, str]
    answers: str


@pytest.fixture(scope="module")
def prepared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    del ray_cluster  # Ray runs
    root = tmp_path_factory.mktemp("learning")
    config = QuickstartConfig(output=str(root / "quickstart"))
    run_quickstart(config, connect=lambda _: None)
    plan = dataset.plan_videos(config.train_videos, config.val_videos, config.seed)
    asked = {
        split: manifest_of_questions(videos, str(root / "quickstart" / "videos"), root / split)
        for split, videos in plan.items()
    }
    answers = root / "answers.json"
    questions.write_answers(str(answers))
    return Prepared(root / "quickstart", asked, str(answers))


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("answering", ["classification", "generation"])
def test_answers_beat_the_most_frequent_answer(
    prepared: Prepared, answering: str, tmp_path: Path
) -> None:
    """Overall, of colors and of shapes. Direction, order and count are only printed.

    The most frequent answer is that of each subject in training, which is better than one answer
    for all questions.
    """
    folder, asked = prepared.folder, prepared.questions
    recipe = recipes.RECIPES["qa_msrvtt_stgt_tiny"](
        (str(folder / "clips" / "train"),),
        str(tmp_path / "run"),
        str(folder / "stage1"),
        str(folder / "vocab.txt"),
        questions=asked["train"],  # type: ignore[call-arg]
        answers=prepared.answers,
    )
    model: Any = replace(recipe.model, answering=answering)  # type: ignore[call-arg]
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    recipe = replace(recipe, model=model, tracking=tracking)
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
    print(f"{answering}: {seconds:.0f} s; {found}, the most frequent answer {base}")
    assert 100 * np.mean(is_right) >= 100 * np.mean(guessed) + BETTER
    for subject in ("color", "shape"):
        assert found[subject] >= base[subject] + BETTER
    assert seconds <= 60 * MINUTES
