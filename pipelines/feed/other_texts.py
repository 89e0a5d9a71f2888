"""Datasets whose clips come with other texts than the captions of their annotations.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.clip_store import more_than
from pipelines.artifacts.generated_captions import (
    CaptionChoice,
    chosen_captions,
    generated_captions,
)
from pipelines.artifacts.questions import Question, by_clip
from pipelines.common import storage
from pipelines.feed.plan import IntArray
from pipelines.feed.sources import (
    EXTRAS,
    Clip,
    ClipSource,
    ManifestSource,
    StoreSource,
    first_of_each,
)
from stgt.inputs.frame_choice import FrameChoice
from stgt.question_answering.vocabulary import AnswerVocabulary


class _SourceWithOtherTexts(ABC):
    """A dataset that takes everything but its texts from another one."""

    def __init__(self, source: ClipSource) -> None:
        self._source = source
        self.uri = source.uri
        self.shard_sizes = source.shard_sizes

    @abstractmethod
    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j texts, j = 0, 1, ..."""

    @abstractmethod
    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of texts of each clip of a shard."""

    @abstractmethod
    def first_captions(self, shard: int) -> list[str]:
        """Return the first text of each clip of a shard; empty for a clip without texts."""

    @abstractmethod
    def _with_texts(self, clip: Clip) -> Clip:
        """Return a clip with its texts as `captions`."""

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        return self._source.clip_ids(shard)

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        return self._source.videos(shard)

    def clip(self, shard: int, row: int) -> Clip:
        """Return a clip with its texts as `captions`."""
        return self._with_texts(self._source.clip(shard, row))

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some clips of a shard, given in ascending order."""
        return [self._with_texts(clip) for clip in self._source.clips(shard, rows)]

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Return frames [T, H, W, 3] uint8 of a clip; see `ClipSource.frames`."""
        return self._source.frames(clip, num_frames, how, generator)

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Start prefetching shards that are needed soon."""
        self._source.prepare(shards, most_bytes)

    def describe_work(self, clip: Clip) -> str:
        """Describe the work of loading a clip, for status messages."""
        return self._source.describe_work(clip)

    def close(self) -> None:
        """Stop the threads and processes of the dataset."""
        self._source.close()


class CaptionedSource(_SourceWithOtherTexts):
    """A dataset in which captions that a model wrote replace or join those of the annotations.

    A clip may be without captions, and is then not used.
    """

    def __init__(self, source: StoreSource | ManifestSource, choice: CaptionChoice) -> None:
        """Choose captions of a dataset.

        Args:
            source: The dataset, opened with `extras`.
            choice: Which captions to use.
        """
        super().__init__(source)
        self._texts_of = source  # the same, whose texts can be read without frames
        self._choice: CaptionChoice = choice
        self._counted: dict[int, tuple[IntArray, bool]] = {}
        """For each shard, the number of captions of each clip, and whether any is generated."""

    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j captions, j = 0, 1, ..."""
        return [more_than(counts) for counts, _ in self._count_all()]

    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of captions of each clip of a shard."""
        return self._count(shard)[0]

    def has_generated(self) -> bool:
        """Return whether any clip has a generated caption."""
        return any(generated for _, generated in self._count_all())

    def _count_all(self) -> list[tuple[IntArray, bool]]:
        with ThreadPoolExecutor(storage.READERS) as pool:
            return list(pool.map(self._count, range(len(self.shard_sizes))))

    def _count(self, shard: int) -> tuple[IntArray, bool]:
        if shard not in self._counted:
            clips = self._texts_of.texts(shard)
            counts = np.array([len(self._chosen(one)) for one in clips], dtype=np.int64)
            generated = any(generated_captions(one[EXTRAS]) for one in clips)
            self._counted[shard] = counts, generated
        return self._counted[shard]

    def first_captions(self, shard: int) -> list[str]:
        """Return the first of the chosen captions of each clip of a shard."""
        return first_of_each([self._chosen(clip) for clip in self._texts_of.texts(shard)])

    def _with_texts(self, clip: Clip) -> Clip:
        return {**clip, "captions": self._chosen(clip)}

    def _chosen(self, clip: Clip) -> list[str]:
        return chosen_captions(clip["captions"], clip[EXTRAS], self._choice)


class AskedSource(_SourceWithOtherTexts):
    """A dataset in which the questions about each clip take the place of its captions.

    The plan then enumerates pairs of a clip and a question as it does pairs of a clip and a
    caption. A clip without questions is not used. Clips have another entry, `answers`: the class of
    the answer to each question.
    """

    def __init__(
        self, source: ClipSource, questions: Sequence[Question], vocabulary: AnswerVocabulary
    ) -> None:
        """Ask questions about a dataset.

        Args:
            source: The dataset.
            questions: Questions about its clips, and perhaps about others. Those with an answer
                outside the vocabulary are left out.
            vocabulary: The answers.
        """
        super().__init__(source)
        self._asked = by_clip([one for one in questions if vocabulary.label_of(one.answer) >= 0])
        self._vocabulary = vocabulary
        self._counts: dict[int, IntArray] = {}

    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j questions, j = 0, 1, ..."""
        shards = range(len(self.shard_sizes))
        return [more_than(self.caption_counts(shard)) for shard in shards]

    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of questions about each clip of a shard."""
        if shard not in self._counts:
            counts = [len(self._asked.get(one, ())) for one in self.clip_ids(shard)]
            self._counts[shard] = np.array(counts, dtype=np.int64)
        return self._counts[shard]

    def first_captions(self, shard: int) -> list[str]:
        """Return the first question about each clip of a shard."""
        asked = [self._asked.get(clip_id, []) for clip_id in self.clip_ids(shard)]
        return first_of_each([[one.question for one in questions] for questions in asked])

    def _with_texts(self, clip: Clip) -> Clip:
        """Return a clip with its questions as `captions`, and `answers`."""
        asked = self._asked.get(clip["clip_id"], [])
        return {
            **clip,
            "captions": [one.question for one in asked],
            "answers": [self._vocabulary.label_of(one.answer) for one in asked],
        }
