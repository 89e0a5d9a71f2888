"""Plan -> Ray Data -> batches on the training workers.

Index rows are cut into blocks of m clips, data workers turn each block into a batch of uint8 frames
and token ids, and with the order kept block k reaches training worker k % world. One data set spans
all epochs of a run; after a restart it begins at the step of the checkpoint.

Legend: B clips of a batch, T frames, H and W pixels, S text tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy

from pipelines import checkpoints
from pipelines.clips import ClipStore
from pipelines.config import TrainConfig
from pipelines.plan import SamplePlan
from stgt.config import AugmentConfig
from stgt.sampling import FrameChoice, choose_frames

SHARDS_IN_MEMORY = 2
"""A block lies in one shard, or in two where one ends."""


class Batch(TypedDict):
    """What a training worker receives."""

    position: npt.NDArray[np.int64]
    """[B] place of each sample in the plan."""
    frames: npt.NDArray[np.uint8]
    """[B, T, H, W, 3]"""
    input_ids: npt.NDArray[np.int64]
    """[B, S]"""
    attention_mask: npt.NDArray[np.int64]
    """[B, S], 1 = a real token."""
    clip_id: npt.NDArray[np.object_]
    """[B] str"""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What a data worker does to each clip."""

    store: str
    vocab: str
    max_text_tokens: int
    num_frames: int
    frame_choice: FrameChoice
    augment: AugmentConfig
    seed: int


class ClipLoader:
    """Reads, samples and augments the clips of a block (a Ray Data actor).

    Reads:
        id, int64: position in the plan, counted from the first one of this data set.
    Adds:
        the columns of `Batch`.
    """

    def __init__(self, config: LoaderConfig, start_position: int = 0) -> None:
        self._config = config
        self._start_position = start_position
        self._store = ClipStore(config.store)
        self._plan = SamplePlan(self._store.shard_sizes, config.seed)
        # Imported here: Ray unpickles this class in coordinating processes that never load a clip,
        # and torch would cost each of them seconds and half a gigabyte.
        from stgt.frames import augment_clip
        from stgt.text import Tokenizer

        self._augment = augment_clip
        self._tokenizer = Tokenizer(config.vocab)
        self._shards: OrderedDict[int, pa.Table] = OrderedDict()

    def _shard(self, index: int) -> pa.Table:
        if index not in self._shards:
            self._shards[index] = self._store.read_shard(index, ["clip_id", "captions", "frames"])
            while len(self._shards) > SHARDS_IN_MEMORY:
                self._shards.popitem(last=False)
        self._shards.move_to_end(index)
        return self._shards[index]

    def _sample(self, epoch: int, shard: int, row: int) -> tuple[str, str, npt.NDArray[np.uint8]]:
        """Clip id, caption and frames [T, H, W, 3]; chance depends on the sample alone."""
        config = self._config
        clip = self._shard(shard).slice(row, 1).to_pylist()[0]
        generator = np.random.default_rng((config.seed, epoch, shard, row))
        caption = clip["captions"][int(generator.integers(len(clip["captions"])))]
        coded = clip["frames"]
        chosen = choose_frames(len(coded), config.num_frames, config.frame_choice, generator)
        frames = self._store.decode([coded[i] for i in chosen])
        return clip["clip_id"], caption, self._augment(frames, config.augment, generator)

    def __call__(self, block: dict[str, npt.NDArray[np.int64]]) -> Batch:
        """Load the clips at the positions of a block."""
        positions = block["id"] + self._start_position
        places = self._plan.locate(positions)
        samples = [
            self._sample(int(epoch), int(shard), int(row))
            for epoch, shard, row in zip(
                places["epoch"], places["shard"], places["row"], strict=True
            )
        ]
        text = self._tokenizer([caption for _, caption, _ in samples], self._config.max_text_tokens)
        return Batch(
            position=positions,
            frames=np.stack([frames for _, _, frames in samples]),
            input_ids=text.input_ids.numpy(),
            attention_mask=text.attention_mask.numpy(),
            clip_id=np.array([clip_id for clip_id, _, _ in samples], dtype=object),
        )


def build_feed(
    loader: LoaderConfig,
    start_position: int,
    stop_position: int,
    block_clips: int,
    num_loaders: int,
) -> ray.data.Dataset:
    """The data set of a run, from a position of the plan on.

    Args:
        loader: what is done to each clip.
        start_position: first sample, inclusive.
        stop_position: last sample, exclusive.
        block_clips: clips per block.
        num_loaders: data workers.
    """
    index = ray.data.range(stop_position - start_position).repartition(
        target_num_rows_per_block=block_clips, strict=True
    )
    return index.map_batches(
        ClipLoader,
        fn_constructor_args=(loader, start_position),
        batch_size=None,
        compute=ActorPoolStrategy(size=num_loaders),
        num_cpus=1,
    )


@dataclass(frozen=True)
class ResumableFeed:
    """Gives Ray Train its data set; called at every start of the worker group.

    The data set begins where the latest complete checkpoint ends, which is what the workers load.
    """

    config: TrainConfig

    def __call__(self) -> ray.data.Dataset:
        """Build the data set of what is left of the run."""
        config = self.config
        step = checkpoints.latest(config.output) or 0
        return build_feed(
            LoaderConfig(
                store=config.store,
                vocab=config.vocab,
                max_text_tokens=config.model.max_text_tokens,
                num_frames=config.num_frames,
                frame_choice=config.frame_choice,
                augment=config.augment,
                seed=config.seed,
            ),
            start_position=step * config.global_batch,
            stop_position=config.steps * config.global_batch,
            block_clips=config.block_clips,
            num_loaders=config.num_loaders,
        )
