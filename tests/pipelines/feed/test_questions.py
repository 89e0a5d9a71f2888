"""Questions in place of captions: every one is used once per epoch, with its answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from pipelines.artifacts.questions import Question
from pipelines.feed.other_texts import AskedSource
from pipelines.feed.plan import TrainPlan
from pipelines.feed.sources import Clip
from stgt.errors import SettingError
from stgt.inputs.frame_choice import FrameChoice
from stgt.question_answering.vocabulary import AnswerVocabulary

SHARDS = [["a", "b", "c"], ["d", "e"]]
VOCABULARY = AnswerVocabulary(("cat", "dog", "two"))


class ClipsInMemory:
    """Clips in two shards; their frames are never read here."""

    uri = "memory"
    shard_sizes = [3, 2]

    def captions_per_shard(self) -> list[list[int]]:
        return [[3], [2]]

    def caption_counts(self, shard: int) -> npt.NDArray[np.int64]:
        return np.ones(self.shard_sizes[shard], dtype=np.int64)

    def clip_ids(self, shard: int) -> list[str]:
        return SHARDS[shard]

    def videos(self, shard: int) -> list[tuple[str, str]]:
        return [(one, f"{one}.mp4") for one in SHARDS[shard]]

    def clip(self, shard: int, row: int) -> Clip:
        return {"clip_id": SHARDS[shard][row], "captions": ["a caption"]}

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        return [self.clip(shard, row) for row in rows]

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        raise NotImplementedError

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None: ...

    def describe_work(self, clip: Clip) -> str:
        return clip["clip_id"]

    def close(self) -> None: ...


def ask(*asked: tuple[str, str, str]) -> AskedSource:
    questions = [
        Question(clip, str(number), question, answer)
        for number, (clip, question, answer) in enumerate(asked)
    ]
    return AskedSource(ClipsInMemory(), questions, VOCABULARY)


def test_the_plan_uses_every_question_once_per_epoch_with_its_answer() -> None:
    asked = [
        ("a", "what purrs", "cat"),
        ("a", "how many", "two"),
        ("a", "who barks", "Dog"),
        ("c", "what barks", "dog"),
        ("e", "how many run", "two"),
        ("e", "what sleeps", "cat"),
    ]
    source = ask(*asked)
    plan = TrainPlan([source.captions_per_shard()], seed=3)
    found = plan.locate(np.arange(plan.num_samples))

    used = []
    for number, shard, index in zip(
        found["number"].tolist(), found["shard"].tolist(), found["index"].tolist(), strict=True
    ):
        row = int(np.flatnonzero(source.caption_counts(shard) > number)[index])
        clip = source.clip(shard, row)
        label = clip["answers"][number]
        used.append((clip["clip_id"], clip["captions"][number], VOCABULARY.answer_of(label)))
    assert sorted(used) == sorted((clip, text, answer.lower()) for clip, text, answer in asked)


def test_questions_with_other_answers_or_about_other_clips_are_left_out() -> None:
    source = ask(("a", "what purrs", "tiger"), ("d", "what purrs", "cat"), ("z", "who", "cat"))

    assert source.captions_per_shard() == [[0], [1]] or source.captions_per_shard() == [[], [1]]
    assert source.clip(0, 0)["captions"] == []
    assert source.clip(1, 0)["answers"] == [0]


def test_a_training_without_any_usable_question_is_refused() -> None:
    source = ask(("a", "what purrs", "tiger"))
    counts = [one or [0] for one in source.captions_per_shard()]

    with pytest.raises(SettingError, match="no clips with captions"):
        TrainPlan([counts], seed=0)
