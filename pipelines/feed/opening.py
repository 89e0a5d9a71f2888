"""Opens the datasets that a config names, and plans which of their clips are used when."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.artifacts.clip_store import more_than
from pipelines.artifacts.generated_captions import CaptionChoice
from pipelines.artifacts.locations import is_manifest
from pipelines.artifacts.questions import read_answers, read_questions
from pipelines.feed.config import LoaderConfig, Resize
from pipelines.feed.dataset_checks import digest_of
from pipelines.feed.held_out import HeldOut, hold_out_last, hold_out_videos, read_held_out
from pipelines.feed.other_texts import AskedSource, CaptionedSource
from pipelines.feed.plan import TrainPlan
from pipelines.feed.shard_cache import ShardCache
from pipelines.feed.sources import ClipSource, ManifestSource, StoreSource
from pipelines.video.config import FrameRules


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
