"""Reads training clips from a clip store, or decodes the videos of a manifest on the fly.

Both are divided into shards, and a sample is one row of a shard. A manifest clip that cannot be
decoded or has no caption is reported with a reason and is not replaced by another clip.

Legend: T frames, H and W pixels.
"""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.artifacts.clip_store import ClipStore, caption_counts, more_than
from pipelines.artifacts.generated_captions import (
    CaptionChoice,
    chosen_captions,
    generated_captions,
)
from pipelines.artifacts.manifest import (
    ManifestRows,
    check_manifest,
    refuse_web_addresses,
)
from pipelines.artifacts.questions import Question, by_clip, read_answers, read_questions
from pipelines.common import storage
from pipelines.common.config import fingerprint
from pipelines.feed.config import LoaderConfig, Resize
from pipelines.feed.held_out import HeldOut, hold_out_last, hold_out_videos, read_held_out
from pipelines.feed.plan import IntArray, TrainPlan
from pipelines.feed.shard_cache import ShardCache
from pipelines.video.config import FrameRules, SamplingConfig
from stgt.errors import ClipStoreError, VideoDecodeError
from stgt.inputs.frame_choice import FrameChoice, choose_frames
from stgt.question_answering.vocabulary import AnswerVocabulary

MANIFEST_ENDING = ".parquet"
ROWS_PER_PART = 1024
"""Number of manifest rows that form a shard. Any range of rows is a random sample of the clips."""
EXTRAS = "extras"
FRAMES, FRAME_INDICES = "frames", "frame_indices"
SHARDS_IN_MEMORY = 2
"""A block of samples lies in one shard, or in two at the end of a shard."""

Clip = Mapping[str, Any]


def shards_in_memory(shard_sizes: Sequence[int], window: int) -> int:
    """Return the number of shards of a dataset to keep open.

    Args:
        shard_sizes: Number of clips of each shard.
        window: Number of samples that are read in another order than that of the plan, as with
            `similar_captions`. A block then has samples of all of their shards.
    """
    return SHARDS_IN_MEMORY + math.ceil(window * len(shard_sizes) / max(1, sum(shard_sizes)))


class ClipSource(Protocol):
    """A dataset of clips in shards."""

    uri: str
    shard_sizes: list[int]

    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j captions, j = 0, 1, ..."""
        ...

    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of captions of each clip of a shard."""
        ...

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        ...

    def first_captions(self, shard: int) -> list[str]:
        """Return the first caption of each clip of a shard; empty for a clip without captions."""
        ...

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        ...

    def clip(self, shard: int, row: int) -> Clip:
        """Return a clip with at least `clip_id`, `captions`, `video_uri`, `start_s`, `end_s`."""
        ...

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some clips of a shard, given in ascending order."""
        ...

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Return frames [T, H, W, 3] uint8 of a clip.

        Raises:
            VideoDecodeError: The clip cannot be decoded or has no caption.
        """
        ...

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Start prefetching shards that are needed soon, and return immediately.

        Args:
            shards: shards in the order in which they are needed.
            most_bytes: maximum size of the shards to prefetch; later shards are left out.
        """
        ...

    def describe_work(self, clip: Clip) -> str:
        """Describe the work of loading a clip, for status messages."""
        ...

    def close(self) -> None:
        """Stop the threads and processes of the source."""
        ...


def _firsts(captions: Sequence[Sequence[str]]) -> list[str]:
    return [one[0] if one else "" for one in captions]


class StoreSource:
    """The clips of a clip store."""

    COLUMNS = ("clip_id", "captions", "video_uri", "start_s", "end_s")

    def __init__(
        self,
        uri: str,
        cache: ShardCache | None = None,
        with_extras: bool = False,
        with_frames: bool = True,
        window: int = 0,
    ) -> None:
        """Open a store.

        Args:
            uri: the store.
            cache: cache that shares shards with other processes of this node. None reads shards
                into this process, which suits a process that uses whole shards.
            with_extras: whether clips have `extras` as well.
            with_frames: whether clips have `frames`. If not, they have `frame_indices`, which is as
                long.
            window: number of samples that are read in another order than that of the plan.

        Raises:
            ClipStoreError: The store does not exist, or its ingest has not finished.
        """
        self._store = ClipStore(uri)
        frames = FRAMES if with_frames else FRAME_INDICES
        self._columns = (*self.COLUMNS, frames, *([EXTRAS] if with_extras else []))
        self.uri = self._store.uri
        self.shard_sizes = self._store.shard_sizes
        self._shards: OrderedDict[int, pa.Table] = OrderedDict()
        self._shards_in_memory = shards_in_memory(self.shard_sizes, window)
        self._cache = cache
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="shards_ahead")
        self._prepared: set[int] = set()

    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j captions, j = 0, 1, ..."""
        return self._store.captions_per_shard

    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of captions of each clip of a shard."""
        if self._cache is None and shard not in self._shards:
            return self._store.caption_counts(shard)
        return caption_counts(self._table(shard)["captions"])

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        return self._store.read_shard(shard, ["clip_id"])["clip_id"].to_pylist()

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        table = self._store.read_shard(shard, ["video_id", "video_uri"])
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some rows of a shard, in ascending order, without reading all of the shard."""
        return list(self._store.read_rows(shard, list(rows), list(self._columns)))

    def first_captions(self, shard: int) -> list[str]:
        """Return the first caption of each clip of a shard, without reading its frames."""
        return _firsts(self._store.read_columns(shard, ["captions"])["captions"].to_pylist())

    def texts(self, shard: int) -> list[Clip]:
        """Return `captions` and `extras` of each clip of a shard, without reading its frames."""
        return self._store.read_columns(shard, ["captions", EXTRAS]).to_pylist()

    def _cache_key(self, shard: int) -> str:
        # The columns are part of the key, since the cache may hold shards of another version.
        return f"{self._store.shard_key(shard)}-{fingerprint(list(self._columns))}"

    def _read(self, shard: int) -> pa.Table:
        return self._store.read_shard(shard, list(self._columns))

    def clip(self, shard: int, row: int) -> Clip:
        """Return a row of the store."""
        return self._table(shard).slice(row, 1).to_pylist()[0]

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._shards:
            self._prepared.discard(shard)
            if self._cache is None:
                self._shards[shard] = self._read(shard)
            else:
                key = self._cache_key(shard)
                self._shards[shard] = self._cache.table(key, lambda: self._read(shard))
            while len(self._shards) > self._shards_in_memory:
                self._shards.popitem(last=False)
        self._shards.move_to_end(shard)
        return self._shards[shard]

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Decode some of the stored frames."""
        coded = clip[FRAMES]
        chosen = choose_frames(len(coded), num_frames, how, generator)
        return self._store.decode([coded[i] for i in chosen])

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Let the cache fetch shards in a background thread.

        If that fails, the shard is fetched again when a clip needs it, which raises the error.
        """
        if self._cache is None:
            return
        for shard in shards:
            most_bytes -= self._store.shard_bytes(shard)
            if most_bytes < 0:
                return
            if shard not in self._prepared and shard not in self._shards:
                self._prepared.add(shard)
                key = self._cache_key(shard)
                self._ahead.submit(self._cache.prepare, key, functools.partial(self._read, shard))

    def describe_work(self, clip: Clip) -> str:
        """Describe the work of loading a clip, for status messages."""
        return f"reading {clip['clip_id']} from {self.uri}"

    def close(self) -> None:
        """Cancel prefetching."""
        self._ahead.shutdown(wait=False, cancel_futures=True)


class ManifestSource:
    """The clips of a manifest, decoded on demand."""

    COLUMNS = ("clip_id", "captions", "video_uri", "start_s", "end_s")

    def __init__(
        self,
        uri: str,
        size: int,
        resize: Resize,
        frame_rules: FrameRules = 2,
        with_extras: bool = False,
        window: int = 0,
    ) -> None:
        self._columns = (*self.COLUMNS, EXTRAS) if with_extras else self.COLUMNS
        self.uri = storage.resolve(uri)
        self._rows = ManifestRows(self.uri)
        self._size = size
        self._resize: Resize = resize
        self._frame_rules: FrameRules = frame_rules
        count = len(self._rows)
        self.shard_sizes = [
            min(ROWS_PER_PART, count - first) for first in range(0, count, ROWS_PER_PART)
        ]
        self._parts: OrderedDict[int, list[dict]] = OrderedDict()
        self._shards_in_memory = shards_in_memory(self.shard_sizes, window)
        self._decoder: Any = None
        self._decodes: tuple[int, FrameChoice] | None = None

    def captions_per_shard(self) -> list[list[int]]:
        """Return for each shard the number of clips with more than j captions, j = 0, 1, ..."""
        if self._rows.has_one_caption_each:
            return [[size] for size in self.shard_sizes]
        counts = self._rows.caption_counts()
        return [
            more_than(counts[first : first + ROWS_PER_PART])
            for first in range(0, len(counts), ROWS_PER_PART)
        ]

    def caption_counts(self, shard: int) -> IntArray:
        """Return [clips] int64, the number of captions of each clip of a shard."""
        if self._rows.has_one_caption_each:
            return np.ones(self.shard_sizes[shard], dtype=np.int64)
        # Not the counts of all rows: a data worker would read the captions of the whole manifest.
        return np.array([len(row["captions"]) for row in self._part(shard)], dtype=np.int64)

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        first = shard * ROWS_PER_PART
        rows = self._rows.read(first, first + ROWS_PER_PART, ["clip_id"])
        return [row["clip_id"] for row in rows]

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        first = shard * ROWS_PER_PART
        rows = self._rows.read(first, first + ROWS_PER_PART, ["video_id", "video_uri"])
        return [(row["video_id"], row["video_uri"]) for row in rows]

    def first_captions(self, shard: int) -> list[str]:
        """Return the first caption of each clip of a shard."""
        return _firsts([row["captions"] for row in self._part(shard)])

    def texts(self, shard: int) -> list[Clip]:
        """Return `captions` and `extras` of each clip of a shard."""
        first = shard * ROWS_PER_PART
        return list(self._rows.read(first, first + ROWS_PER_PART, ["captions", EXTRAS]))

    def clip(self, shard: int, row: int) -> Clip:
        """Return a row of the manifest."""
        return self._part(shard)[row]

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some rows of the manifest."""
        return [self._part(shard)[row] for row in rows]

    def _part(self, shard: int) -> list[dict]:
        if shard not in self._parts:
            first = shard * ROWS_PER_PART
            self._parts[shard] = self._rows.read(first, first + ROWS_PER_PART, list(self._columns))
            while len(self._parts) > self._shards_in_memory:
                self._parts.popitem(last=False)
        self._parts.move_to_end(shard)
        return self._parts[shard]

    def frames(
        self, clip: Clip, num_frames: int, how: FrameChoice, generator: np.random.Generator
    ) -> npt.NDArray[np.uint8]:
        """Decode frames of the video."""
        from pipelines.video.decoder import ClipDecoder, ClipSpan

        if self._decodes != (num_frames, how):
            self.close()
            sampling = SamplingConfig(
                num_frames=num_frames,
                size=self._size,
                resize=self._resize,
                frame_choice=how,
                frame_rules=self._frame_rules,
            )
            self._decoder, self._decodes = ClipDecoder(sampling), (num_frames, how)
        if not clip["captions"]:
            raise VideoDecodeError(clip["clip_id"], "no_caption", "the clip has no caption")
        seed = tuple(generator.integers(2**32, size=2).tolist())
        source = ClipSpan(
            clip["clip_id"], clip["video_uri"], clip["start_s"], clip["end_s"], seed=seed
        )
        return self._decoder.decode(source).frames

    def prepare(self, shards: Sequence[int], most_bytes: float) -> None:
        """Do nothing, since rows of a manifest are read quickly."""

    def describe_work(self, clip: Clip) -> str:
        """Describe the work of loading a clip, for status messages."""
        return f"decoding {clip['clip_id']} from {clip['video_uri']}"

    def close(self) -> None:
        """Stop the decoder's child process."""
        if self._decoder is not None:
            self._decoder.close()
            self._decoder = self._decodes = None


def open_source(
    uri: str,
    size: int,
    resize: Resize,
    cache: ShardCache | None = None,
    frame_rules: FrameRules = 2,
    captions: CaptionChoice = "original",
    with_frames: bool = True,
    window: int = 0,
) -> ClipSource:
    """Open a dataset by its URI: a manifest ends in .parquet, anything else is a clip store.

    Args:
        uri: the dataset.
        size: edge length of frames decoded from a manifest's videos, in pixels.
        resize: how frames decoded from a manifest's videos are made square.
        cache: cache that shares the shards of a store with other processes of this node.
        frame_rules: rules by which frames of a manifest's videos are found and cropped.
        captions: which captions of each clip to use.
        with_frames: whether clips of a store are read with their frames.
        window: number of samples that are read in another order than that of the plan.
    """
    with_extras = captions != "original"
    source: StoreSource | ManifestSource
    if is_manifest(uri):
        source = ManifestSource(uri, size, resize, frame_rules, with_extras, window=window)
    else:
        source = StoreSource(uri, cache, with_extras, with_frames, window)
    return CaptionedSource(source, captions) if with_extras else source


class CaptionedSource:
    """A dataset in which captions that a model wrote replace or join those of the annotations.

    A clip may be without captions, and is then not used.
    """

    def __init__(self, source: StoreSource | ManifestSource, choice: CaptionChoice) -> None:
        """Choose captions of a dataset.

        Args:
            source: The dataset, opened with `extras`.
            choice: Which captions to use.
        """
        self._source = source
        self._choice: CaptionChoice = choice
        self.uri = source.uri
        self.shard_sizes = source.shard_sizes
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
            clips = self._source.texts(shard)
            counts = np.array([len(self._chosen(one)) for one in clips], dtype=np.int64)
            generated = any(generated_captions(one[EXTRAS]) for one in clips)
            self._counted[shard] = counts, generated
        return self._counted[shard]

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        return self._source.clip_ids(shard)

    def first_captions(self, shard: int) -> list[str]:
        """Return the first of the chosen captions of each clip of a shard."""
        return _firsts([self._chosen(clip) for clip in self._source.texts(shard)])

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        return self._source.videos(shard)

    def clip(self, shard: int, row: int) -> Clip:
        """Return a clip with the chosen captions."""
        return self._with_chosen(self._source.clip(shard, row))

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some clips of a shard, given in ascending order."""
        return [self._with_chosen(clip) for clip in self._source.clips(shard, rows)]

    def _with_chosen(self, clip: Clip) -> Clip:
        return {**clip, "captions": self._chosen(clip)}

    def _chosen(self, clip: Clip) -> list[str]:
        return chosen_captions(clip["captions"], clip[EXTRAS], self._choice)

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


class AskedSource:
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
        self._source = source
        self.uri = source.uri
        self.shard_sizes = source.shard_sizes
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
            counts = [len(self._asked.get(one, ())) for one in self._source.clip_ids(shard)]
            self._counts[shard] = np.array(counts, dtype=np.int64)
        return self._counts[shard]

    def clip_ids(self, shard: int) -> list[str]:
        """Return the id of each clip of a shard."""
        return self._source.clip_ids(shard)

    def first_captions(self, shard: int) -> list[str]:
        """Return the first question about each clip of a shard."""
        asked = [self._asked.get(clip_id, []) for clip_id in self.clip_ids(shard)]
        return _firsts([[one.question for one in questions] for questions in asked])

    def videos(self, shard: int) -> list[tuple[str, str]]:
        """Return the id and the URI of the video of each clip of a shard."""
        return self._source.videos(shard)

    def clip(self, shard: int, row: int) -> Clip:
        """Return a clip with its questions as `captions`, and `answers`."""
        return self._with_questions(self._source.clip(shard, row))

    def clips(self, shard: int, rows: Sequence[int]) -> list[Clip]:
        """Return some clips of a shard, given in ascending order."""
        return [self._with_questions(clip) for clip in self._source.clips(shard, rows)]

    def _with_questions(self, clip: Clip) -> Clip:
        asked = self._asked.get(clip["clip_id"], [])
        return {
            **clip,
            "captions": [one.question for one in asked],
            "answers": [self._vocabulary.label_of(one.answer) for one in asked],
        }

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


def open_sources(config: LoaderConfig, cache: ShardCache | None = None) -> list[ClipSource]:
    """Open the datasets of a training run, with questions in place of captions if there are any."""
    sources: list[ClipSource] = [
        open_source(
            uri,
            config.size,
            config.resize,
            cache,
            config.frame_rules,
            config.captions,
            with_frames=not config.features,
            window=config.window,
        )
        for uri in config.data
    ]
    if config.questions is None:
        return sources
    assert config.answers is not None, "checked by the training's config"
    questions, vocabulary = read_questions(config.questions), read_answers(config.answers)
    return [AskedSource(source, questions, vocabulary) for source in sources]


def make_plan(sources: Sequence[ClipSource], config: LoaderConfig, held_out: HeldOut) -> TrainPlan:
    """Plan the order in which the captions of the datasets' clips are used.

    Args:
        sources: The datasets.
        config: Settings of the data workers.
        held_out: Clips of the first dataset to leave out.
    """
    if config.epoch_unit == "captions":
        counts = [[one or [0] for one in source.captions_per_shard()] for source in sources]
    else:
        counts = [[[size] for size in source.shard_sizes] for source in sources]
    for shard, rows in held_out.rows.items():
        captions = (
            sources[0].caption_counts(shard)[rows]
            if config.epoch_unit == "captions"
            else np.ones(len(rows), dtype=np.int64)
        )
        whole, out = counts[0][shard], more_than(captions)
        out += [0] * (len(whole) - len(out))
        counts[0][shard] = [a - b for a, b in zip(whole, out, strict=True)]
    return TrainPlan(counts, config.seed, config.mix)


def hold_out(sources: Sequence[ClipSource], config: LoaderConfig) -> HeldOut:
    """Return the clips of the first dataset that are held out of training.

    They are read from the file that the config names, if it was written for the same clips.
    """
    if config.hold_out == 0:
        return HeldOut()
    if config.hold_out_by == "clip":
        return hold_out_last(sources[0].shard_sizes, config.hold_out)
    if config.held_out is not None:
        known = read_held_out(config.held_out, digest_of(sources[0].uri), config.hold_out)
        if known is not None:
            return known
    return hold_out_videos(sources[0], config.hold_out)


def is_manifest(uri: str) -> bool:
    """Return whether a dataset is a manifest."""
    return uri.endswith(MANIFEST_ENDING)


def check_source(
    uri: str, size: int, num_frames: int, resize: Resize, needs_captions: bool = True
) -> str:
    """Check that a dataset is suitable for training, and return a digest of its contents.

    Args:
        uri: The dataset.
        size: Edge length of the model's frames, in pixels.
        num_frames: Number of frames per sample.
        resize: How the model's frames are made square.
        needs_captions: False if the clips are used with other texts than their own captions.

    Raises:
        ManifestError: The manifest cannot be used.
        ClipStoreError: The store is missing or unfinished, has clips without captions, or its
            frames do not suit the model.
    """
    if is_manifest(uri):
        check_manifest(storage.resolve(uri))
        refuse_web_addresses(storage.resolve(uri))
        return digest_of(uri)
    store = ClipStore(uri)
    without = store.num_clips - sum(store.catalogue["histograms"]["captions_per_clip"])
    if without > 0 and needs_captions:
        raise ClipStoreError(
            f"{uri} contains {without} clips without a caption; train on a store that was ingested "
            "from annotations with captions, or write captions with python -m jobs.caption, ingest "
            "its manifest, and pass --captions both"
        )
    check_frames(store, size, num_frames, resize)
    return digest_of(uri)


def check_frames(store: ClipStore, size: int, num_frames: int, resize: Resize) -> None:
    """Check that the frames in a store suit a model.

    Raises:
        ClipStoreError: The frames have another size or were resized differently, or are too few.
    """
    stored = store.sampling
    needed = {"sampling.size": size, "sampling.resize": resize}
    found = {"sampling.size": stored.size, "sampling.resize": stored.resize}
    if differing := [name for name in needed if needed[name] != found[name]]:
        raise ClipStoreError(
            f"{store.uri} was ingested with "
            + ", ".join(f"{name} = {found[name]}" for name in differing)
            + ", but the model needs "
            + ", ".join(f"{name} = {needed[name]}" for name in differing)
            + "; ingest again with "
            + " ".join(f"--{name} {needed[name]}" for name in differing)
        )
    if stored.num_frames < num_frames:
        raise ClipStoreError(
            f"{store.uri} contains {stored.num_frames} frames per clip, but the model takes "
            f"{num_frames}; ingest more frames (--sampling.num-frames) or use fewer (--num-frames)"
        )


def digest_of(uri: str) -> str:
    """Return a digest of the contents of a dataset."""
    if is_manifest(uri):
        return _digest_of_manifest(uri, storage.version(storage.resolve(uri)))
    return str(ClipStore(uri).catalogue["digest"])


@functools.lru_cache(maxsize=16)
def _digest_of_manifest(uri: str, version: str) -> str:
    """Return the digest of one version of a manifest, which takes seconds for millions of rows."""
    return ManifestRows(uri).digest()


def digest_of_all(digests: list[str]) -> str:
    """Combine the digests of several datasets into one."""
    return digests[0] if len(digests) == 1 else fingerprint(digests)
