"""Questions about the generated clips of the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.manifest.config import ManifestConfig
from pipelines.manifest.run import run_manifest
from pipelines.video.synthetic import dataset, questions
from tests.helpers.data import TinyData


@dataclass(frozen=True)
class TinyQuestions:
    """Manifests with the questions about the tiny data, and their answers."""

    train: str
    val: str
    answers: str


def write_tiny_questions(data: TinyData, folder: Path) -> TinyQuestions:
    """Write the questions of both splits, which are generated again from the same seed."""
    plan = dataset.plan_videos(num_train=40, num_val=12, seed=0)
    manifests = {
        split: manifest_of_questions(videos, data.videos, folder / f"{split}_questions")
        for split, videos in plan.items()
    }
    answers = folder / "answers.json"
    questions.write_answers(str(answers))
    return TinyQuestions(manifests["train"], manifests["val"], str(answers))


def manifest_of_questions(videos: list[dataset.Video], folder: str, name: Path) -> str:
    """Write the questions about videos as JSON lines and as a manifest, and return the latter."""
    annotations, manifest = name.with_suffix(".jsonl"), str(name.with_suffix(".parquet"))
    questions.write_questions(str(annotations), videos)
    run_manifest(
        ManifestConfig(
            format="msrvtt_qa", annotations=(str(annotations),), videos=(folder,), output=manifest
        )
    )
    return manifest
