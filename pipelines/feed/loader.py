"""Loads the clips of a plan with Ray Data and delivers them in batches to the training workers.

Index rows are split into blocks of m clips, and data workers turn each block into a batch of uint8
frames and token ids. Because the order is preserved, block k reaches training worker k % world. One
Ray dataset covers all epochs of a run; after a restart it starts from the step of the checkpoint.

Legend: B clips of a batch, T frames, H and W pixels, S text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt
import ray.data
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy

from pipelines.common.ray_errors import pack_error
from pipelines.common.status_board import ActivityReporter
from pipelines.feed.config import LoaderConfig
from pipelines.feed.shard_cache import ShardCache
from pipelines.feed.sources import make_plan, open_sources
from stgt.config import AugmentConfig
from stgt.errors import STGTError, VideoDecodeError

PREFETCHED_BATCHES = 2

INDEX_ROWS = 2**16
"""Number of index rows that one task generates."""

AHEAD, AHEAD_STRIDE = 4096, 256
"""Shards are prefetched for this many clips ahead, found by sampling the plan at this stride. Only
small shards fall between two sampled positions."""


Frames: TypeAlias = npt.NDArray[np.uint8]
Augmentation: TypeAlias = Callable[[Frames, AugmentConfig, np.random.Generator], Frames]


class Batch(TypedDict):
    """A batch as received by a training worker."""

    position: npt.NDArray[np.int64]
    """[B] position of each sample in the plan."""
    frames: npt.NDArray[np.uint8]
    """[B, T, H, W, 3]; zeros for a clip with a fault."""
    input_ids: npt.NDArray[np.int64]
    """[B, S]"""
    attention_mask: npt.NDArray[np.int64]
    """[B, S]; 1 for a real token, 0 for padding."""
    clip_id: npt.NDArray[np.object_]
    """[B] str"""
    fault: npt.NDArray[np.object_]
    """[B] str: why a clip has no frames; empty if it has frames."""
    error: npt.NDArray[np.object_]
    """[B] bytes: a pickled STGTError that ends the run, or empty. Errors are passed as data because
    Ray keeps only the message of an error raised in a data worker."""


class ClipLoader:
    """Reads or decodes, samples and augments the clips of a block (a Ray Data actor).

    Reads:
        id, int64: position in the plan, relative to the first position of this Ray dataset.
    Adds:
        the columns of `Batch`.
    """

    def __init__(
        self, config: LoaderConfig, start_position: int = 0, board: ActorHandle | None = None
    ) -> None:
        self._config = config
        self._start_position = start_position
        self._notice = ActivityReporter(board)
        cache = ShardCache(config.cache_dir, config.cache_bytes)
        self._sources = open_sources(config, cache)
        self._plan = make_plan(self._sources, config)
        # Imported here because Ray also unpickles this class in coordinating processes that never
        # load a clip. Augmentation loads torch, which takes seconds and half a gigabyte.
        from stgt.inputs.tokenizer import Tokenizer

        self._tokenizer = Tokenizer(config.vocab)
        self._augment: Augmentation | None = None
        if not config.augment.changes_nothing:
            from stgt.inputs.transforms import augment_clip

            self._augment = augment_clip

    def _sample(
        self, epoch: int, shard: int, source: int, own_shard: int, row: int
    ) -> tuple[str, str, npt.NDArray[np.uint8] | None, str]:
        """Load a sample; random choices depend only on the seed and the sample.

        Returns:
            Clip id, caption, frames [T, H, W, 3] or None, and fault (empty if there are frames).
        """
        config, data = self._config, self._sources[source]
        self._notice(f"reading shard {own_shard} of {data.uri}")
        clip = data.clip(own_shard, row)
        self._notice(data.describe_work(clip))
        generator = np.random.default_rng((config.seed, epoch, shard, row))
        captions = clip["captions"] or [""]
        caption = captions[int(generator.integers(len(captions)))]
        try:
            frames = data.frames(clip, config.num_frames, config.frame_choice, generator)
        except VideoDecodeError as error:
            return clip["clip_id"], caption, None, f"{error.reason}: {error.message}"
        if self._augment is not None:
            frames = self._augment(frames, config.augment, generator)
        return clip["clip_id"], caption, frames, ""

    def _prepare(self, position: int) -> None:
        """Start prefetching the shards that are needed soon after a position."""
        # Use only half of the cache, so that prefetched shards do not evict those in use.
        room = self._config.cache_bytes / 2 / len(self._sources)
        coming = self._plan.locate(position + np.arange(AHEAD_STRIDE, AHEAD + 1, AHEAD_STRIDE))
        for number, source in enumerate(self._sources):
            shards = coming["own_shard"][coming["source"] == number]
            source.prepare(list(dict.fromkeys(shards.tolist())), room)

    def __call__(self, block: dict[str, npt.NDArray[np.int64]]) -> Batch:
        """Load the clips at the positions of a block."""
        positions = block["id"] + self._start_position
        try:
            return self._load(positions)
        except STGTError as error:
            nothing = [("", "", "")] * len(positions)
            frames = self._no_frames(len(positions))
            return self._batch(positions, nothing, frames, pack_error(error))

    def _load(self, positions: npt.NDArray[np.int64]) -> Batch:
        places = self._plan.locate(positions)
        self._prepare(int(positions[-1]))
        names = ("epoch", "shard", "source", "own_shard", "row")
        # Fill the array clip by clip, so that frames, the bulk of a batch, exist only once.
        frames = self._no_frames(len(positions))
        samples = []
        for number, place in enumerate(zip(*(places[name] for name in names), strict=True)):
            clip_id, caption, clip, fault = self._sample(*map(int, place))
            if clip is not None:
                frames[number] = clip
            samples.append((clip_id, caption, fault))
        self._notice("waiting for the next block")
        return self._batch(positions, samples, frames)

    def _no_frames(self, clips: int) -> npt.NDArray[np.uint8]:
        config = self._config
        return np.zeros((clips, config.num_frames, config.size, config.size, 3), dtype=np.uint8)

    def _batch(
        self,
        positions: npt.NDArray[np.int64],
        samples: list[tuple[str, str, str]],
        frames: npt.NDArray[np.uint8],
        error: bytes = b"",
    ) -> Batch:
        """Build a batch from the frames and the (clip id, caption, fault) of each sample."""
        captions = [caption for _, caption, _ in samples]
        input_ids, attention_mask = self._tokenizer.encode(captions, self._config.max_text_tokens)
        return Batch(
            position=positions,
            frames=frames,
            input_ids=input_ids,
            attention_mask=attention_mask,
            clip_id=np.array([clip_id for clip_id, *_ in samples], dtype=object),
            fault=np.array([fault for *_, fault in samples], dtype=object),
            error=np.array([error] * len(samples), dtype=object),
        )


def build_feed(
    loader: LoaderConfig,
    start_position: int,
    stop_position: int,
    block_clips: int,
    num_loaders: int,
    board: ActorHandle | None = None,
) -> ray.data.Dataset:
    """Build the Ray dataset that loads a range of the plan.

    Args:
        loader: settings of the data workers.
        start_position: first position, inclusive.
        stop_position: last position, exclusive.
        block_clips: number of clips per block.
        num_loaders: number of data workers.
        board: status board to which data workers report what they are doing.
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
        fn_constructor_args=(loader, start_position, board),
        batch_size=None,
        compute=ActorPoolStrategy(size=num_loaders),
        num_cpus=1,
    )
