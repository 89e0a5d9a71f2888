"""Loads the clips of a plan with Ray Data and delivers them in batches to the training workers.

Index rows are split into blocks of m clips, and data workers turn each block into a batch of uint8
frames and token ids. Because the order is preserved, block k reaches training worker k % world. One
Ray dataset covers all epochs of a run; after a restart it starts from the step of the checkpoint.

Legend: B clips of a batch, T frames, H and W pixels, S text tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import ray.data
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy

from pipelines.artifacts.manifest import clip_hash
from pipelines.common.ray_errors import EXPLAINED, pack_error
from pipelines.common.status_board import ActivityReporter
from pipelines.feed.config import LoaderConfig
from pipelines.feed.opening import hold_out, make_plan, open_sources
from pipelines.feed.plan import IntArray, TrainPlan
from pipelines.feed.shard_cache import ShardCache
from pipelines.feed.similar_captions import SimilarOrder
from pipelines.feed.sources import FRAME_INDICES, Clip, shards_in_memory
from pipelines.feed.stored_tokens import (
    PLACE_COLUMNS,
    Places,
    StoredTokens,
    TokenReader,
    open_reader,
    place_of,
)
from stgt.config import AugmentConfig
from stgt.errors import VideoDecodeError
from stgt.inputs.frame_choice import choose_frames
from stgt.question_answering.vocabulary import NO_ANSWER

PREFETCHED_BATCHES = 2

INDEX_ROWS = 2**16
"""Number of index rows that one task generates."""

AHEAD, AHEAD_STRIDE = 4096, 256
"""Shards are prefetched for this many clips ahead, found by sampling the plan at this stride. Only
small shards fall between two sampled positions."""


Frames: TypeAlias = npt.NDArray[np.uint8]
Augmentation: TypeAlias = Callable[[Frames, AugmentConfig, np.random.Generator], Frames]


@dataclass(frozen=True)
class LoadedSample:
    """A loaded sample."""

    clip_id: str
    clip_key: int
    caption: str
    frames: Frames | None
    """[T, H, W, 3] uint8; None if the clip has a fault, or with stored tokens."""
    fault: str
    """Why a clip has no frames; empty if it has frames."""
    stored: IntArray | None = None
    """[4 + T] int64: where the stored tokens of its frames are; None without stored tokens."""
    answer: int = NO_ANSWER
    """Class of the answer, if the caption is a question."""


class _FramesOrPlaces(TypedDict, total=False):
    """What stands for the frames of a batch. Data workers add one of the first two."""

    frames: npt.NDArray[np.uint8]
    """[B, T, H, W, 3]; zeros for a clip with a fault."""
    stored: Places
    """[B, 4 + T] int64: where the stored tokens of the frames are, in a training with features."""
    tokens: StoredTokens
    """The tokens at these places, which the training worker reads."""


class Batch(_FramesOrPlaces):
    """A batch as received by a training worker."""

    position: npt.NDArray[np.int64]
    """[B] position of each sample in the training: in the plan, or with `similar_captions` in the
    order that is made from it."""
    input_ids: npt.NDArray[np.int64]
    """[B, S]"""
    attention_mask: npt.NDArray[np.int64]
    """[B, S]; 1 for a real token, 0 for padding."""
    clip_id: npt.NDArray[np.object_]
    """[B] str"""
    clip_key: npt.NDArray[np.int64]
    """[B] hash of the video and the span of each clip; equal for the same clip of two datasets."""
    fault: npt.NDArray[np.object_]
    """[B] str: why a clip has no frames; empty if it has frames."""
    answer: npt.NDArray[np.int64]
    """[B] class of the answer, if the texts are questions; else `NO_ANSWER`."""
    error: npt.NDArray[np.object_]
    """[B] bytes: a pickled error that ends the run, or empty. Errors are passed as data because
    Ray keeps only the message of an error raised in a data worker."""


@dataclass(frozen=True)
class ShareOfWorker:
    """The part of each global batch that one training worker gets."""

    rank: int
    world: int
    """Number of training workers."""
    clips: int
    """Number of clips per batch of the worker."""


class ClipLoader:
    """Reads or decodes, samples and augments the clips of a block (a Ray Data actor).

    Reads:
        id, int64: position in the plan, relative to the first position of this Ray dataset.
    Adds:
        the columns of `Batch`.
    """

    def __init__(
        self,
        config: LoaderConfig,
        start_position: int = 0,
        board: ActorHandle | None = None,
        plan: TrainPlan | None = None,
    ) -> None:
        """Open the datasets.

        Args:
            config: Settings of the data workers.
            start_position: Position in the plan of the first sample of this Ray dataset.
            board: Status board to report activities to.
            plan: Order of the clips; None makes it, which reads the counts of all shards.
        """
        self._config = config
        self._start_position = start_position
        self._notice = ActivityReporter(board)
        # An error here would make Ray start the data worker again and again, so it is kept for the
        # first batch, which ends the run with it.
        self._error: Exception | None = None
        try:
            cache = ShardCache(config.cache_dir, config.cache_bytes)
            self._sources = open_sources(config, cache)
            self._held_out = hold_out(self._sources, config)
            self._plan = plan or make_plan(self._sources, config, self._held_out)
            self._kept_rows = sum(
                shards_in_memory(source.shard_sizes, config.window) for source in self._sources
            )
            self._ahead: TokenReader | None = None
            if config.features:
                self._ahead = open_reader(config.features, config.cache_dir, config.cache_bytes)
        except EXPLAINED as error:
            self._error = error
        self._rows: OrderedDict[tuple[int, int, int], IntArray] = OrderedDict()
        self._order: SimilarOrder | None = None
        if config.similar_captions is not None and self._error is None:
            self._order = SimilarOrder(
                config.similar_captions, self._plan.num_samples, config.seed, self._captions_at
            )
        # Imported here because Ray also unpickles this class in coordinating processes that never
        # load a clip. Augmentation loads torch, which takes seconds and half a gigabyte.
        from pipelines.artifacts.vocabulary import open_tokenizer

        self._tokenizer = open_tokenizer(config.vocab)
        self._augment: Augmentation | None = None
        # The views of stored tokens are augmented already.
        if not config.augment.changes_nothing and not config.features:
            from stgt.inputs.transforms import augment_clip

            self._augment = augment_clip

    def _sample(
        self, epoch: int, number: int, shard: int, source: int, own_shard: int, index: int
    ) -> LoadedSample:
        """Load a sample; random choices depend only on the seed and the sample."""
        config, data = self._config, self._sources[source]
        self._notice(f"reading shard {own_shard} of {data.uri}")
        row = int(self._rows_of(source, own_shard, number)[index])
        clip = data.clip(own_shard, row)
        self._notice(data.describe_work(clip))
        later = (number,) if number else ()
        generator = np.random.default_rng((config.seed, epoch, shard, row, *later))
        captions = clip["captions"] or [""]
        if config.epoch_unit == "clips":
            place = int(generator.integers(len(captions)))
        else:
            key = (config.seed, epoch, clip_hash(clip["clip_id"]))
            place = int(np.random.default_rng(key).permutation(len(captions))[number])
        answer = clip["answers"][place] if config.questions is not None else NO_ANSWER
        sample = LoadedSample(
            clip["clip_id"], clip_key(clip), captions[place], None, "", answer=answer
        )
        if config.features:
            # By the same draws as below, so that the frames are the same without stored tokens.
            count = len(clip[FRAME_INDICES])
            chosen = choose_frames(count, config.num_frames, config.frame_choice, generator)
            view = 0 if config.views is None else int(generator.integers(config.views))
            return replace(sample, stored=place_of(source, own_shard, row, view, chosen))
        try:
            frames = data.frames(clip, config.num_frames, config.frame_choice, generator)
        except VideoDecodeError as error:
            return replace(sample, fault=f"{error.reason}: {error.message}")
        if self._augment is not None:
            frames = self._augment(frames, config.augment, generator)
        return replace(sample, frames=frames)

    def _rows_of(self, source: int, own_shard: int, number: int) -> IntArray:
        """Return the rows of a shard that a pass uses, ascending."""
        key = (source, own_shard, number)
        if key not in self._rows:
            data = self._sources[source]
            if self._config.epoch_unit == "clips":
                rows = np.arange(data.shard_sizes[own_shard])
            else:
                rows = np.flatnonzero(data.caption_counts(own_shard) > number)
            held_out = self._held_out.rows.get(own_shard) if source == 0 else None
            self._rows[key] = rows if held_out is None else np.setdiff1d(rows, held_out)
            while len(self._rows) > self._kept_rows:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return self._rows[key]

    def _captions_at(self, positions: IntArray) -> list[str]:
        """Return the first caption of the clip of each sample at positions [n] of the plan."""
        places = self._plan.locate(positions)
        names = ("source", "own_shard", "number", "index")
        found = [""] * len(positions)
        samples: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        for place, (source, shard, number, index) in enumerate(
            zip(*(places[name].tolist() for name in names), strict=True)
        ):
            samples.setdefault((source, shard), []).append((place, number, index))
        for (source, shard), members in samples.items():
            self._notice(f"reading captions of shard {shard} of {self._sources[source].uri}")
            captions = self._sources[source].first_captions(shard)
            for place, number, index in members:
                found[place] = captions[int(self._rows_of(source, shard, number)[index])]
        return found

    def _prepare(self, position: int) -> None:
        """Start prefetching the shards that are needed soon after a position."""
        # Use only half of the cache, so that prefetched shards do not evict those in use.
        room = self._config.cache_bytes / 2 / len(self._sources)
        coming = self._plan.locate(position + np.arange(AHEAD_STRIDE, AHEAD + 1, AHEAD_STRIDE))
        for number, source in enumerate(self._sources):
            shards = coming["own_shard"][coming["source"] == number]
            needed = list(dict.fromkeys(shards.tolist()))
            source.prepare(needed, room)
            if self._ahead is not None:
                self._ahead.prepare(number, needed, room)

    def __call__(self, block: dict[str, IntArray]) -> Batch:
        """Load the clips at the positions of a block."""
        positions = block["id"] + self._start_position
        try:
            if self._error is not None:
                raise self._error
            return self._load(positions)
        except EXPLAINED as error:
            nothing = [LoadedSample("", 0, "", None, "")] * len(positions)
            return self._batch(positions, nothing, error=pack_error(error))

    def _load(self, positions: IntArray) -> Batch:
        places = self._plan.locate(self._order(positions) if self._order else positions)
        self._prepare(int(positions[-1]))
        names = ("epoch", "number", "shard", "source", "own_shard", "index")
        # Fill the array clip by clip, so that frames, the bulk of a batch, exist only once.
        frames = None if self._config.features else self._no_frames(len(positions))
        samples = []
        for number, place in enumerate(zip(*(places[name] for name in names), strict=True)):
            sample = self._sample(*map(int, place))
            if frames is not None and sample.frames is not None:
                frames[number] = sample.frames
            samples.append(replace(sample, frames=None))
        self._notice("waiting for the next block")
        return self._batch(positions, samples, frames)

    def _no_frames(self, clips: int) -> Frames:
        config = self._config
        return np.zeros((clips, config.num_frames, config.size, config.size, 3), dtype=np.uint8)

    def _batch(
        self,
        positions: IntArray,
        samples: Sequence[LoadedSample],
        frames: Frames | None = None,
        error: bytes = b"",
    ) -> Batch:
        captions = [sample.caption for sample in samples]
        # Tokenizers of the hub never clean texts, and have no such argument.
        how = {"clean": False} if self._config.texts_as_written else {}
        input_ids, attention_mask = self._tokenizer.encode(
            captions, self._config.max_text_tokens, **how
        )
        batch = Batch(
            position=positions,
            input_ids=input_ids,
            attention_mask=attention_mask,
            clip_id=np.array([sample.clip_id for sample in samples], dtype=object),
            clip_key=np.array([sample.clip_key for sample in samples], dtype=np.int64),
            fault=np.array([sample.fault for sample in samples], dtype=object),
            answer=np.array([sample.answer for sample in samples], dtype=np.int64),
            error=np.array([error] * len(samples), dtype=object),
        )
        if self._config.features:
            nowhere = np.zeros(len(PLACE_COLUMNS) + self._config.num_frames, dtype=np.int64)
            stored = [nowhere if one.stored is None else one.stored for one in samples]
            batch["stored"] = np.stack(stored)
        else:
            batch["frames"] = self._no_frames(len(positions)) if frames is None else frames
        return batch


def clip_key(clip: Clip) -> int:
    """Return a signed 64-bit hash of a clip's video and span.

    Clips with the same key show the same frames. Other spans of a video have other keys.
    """
    span = f"{clip['video_uri']} {clip['start_s']} {clip['end_s']}"
    return clip_hash(span) - 2**63


def load_in_process(
    loader: ClipLoader,
    start_position: int,
    stop_position: int,
    block_clips: int,
    share: ShareOfWorker,
) -> Iterator[Batch]:
    """Yield the batches of one training worker, loaded in its own process without Ray Data.

    They equal the batches that `build_feed` delivers to the worker.

    Args:
        loader: loads clips; its start position must be 0.
        start_position: first position of the plan, inclusive.
        stop_position: last position, exclusive.
        block_clips: number of clips per block.
        share: which blocks belong to the worker.
    """
    steps = (stop_position - start_position) // (share.clips * share.world)
    blocks = np.arange(steps * (share.clips // block_clips)) * share.world + share.rank
    for own in blocks.reshape(steps, -1):
        starts = start_position + own[:, None] * block_clips
        yield loader({"id": (starts + np.arange(block_clips)).reshape(-1)})


def build_feed(
    loader: LoaderConfig,
    start_position: int,
    stop_position: int,
    block_clips: int,
    num_loaders: int,
    board: ActorHandle | None = None,
    plan: TrainPlan | None = None,
) -> ray.data.Dataset:
    """Build the Ray dataset that loads a range of the plan.

    Args:
        loader: settings of the data workers.
        start_position: first position, inclusive.
        stop_position: last position, exclusive.
        block_clips: number of clips per block.
        num_loaders: number of data workers.
        board: status board to which data workers report what they are doing.
        plan: order of the clips; None lets each data worker make it.
    """
    count = stop_position - start_position
    # By default Ray splits the index into two pieces per CPU of the cluster, each read by a process
    # that first imports Ray Data, which delays the first batch.
    pieces = max(1, -(-count // INDEX_ROWS))
    index = ray.data.range(count, override_num_blocks=pieces).repartition(
        target_num_rows_per_block=block_clips, strict=True
    )
    return index.map_batches(
        ClipLoader,
        fn_constructor_args=(loader, start_position, board, plan),
        batch_size=None,
        compute=ActorPoolStrategy(size=num_loaders),
        num_cpus=1,
    )
