"""Validates a model during training, to monitor it and to choose the best checkpoint.

Validation is text-to-video retrieval by cosine similarity on a few clips, over all training
workers. Benchmark results come from the evaluate stage.
"""

from __future__ import annotations

import itertools
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from pipelines.artifacts.locations import is_manifest
from pipelines.common.config import fingerprint
from pipelines.feed.dataset_checks import digest_of
from pipelines.feed.opening import hold_out, open_source
from pipelines.feed.sources import FRAME_INDICES, Clip, ClipSource, StoreSource
from pipelines.feed.stored_tokens import TokenReader, place_of
from pipelines.train import answers, features
from pipelines.train.config import TrainConfig
from pipelines.train.metrics_log import MeasuredOn
from stgt.errors import ClipStoreError, VideoDecodeError
from stgt.inputs.frame_choice import choose_frames
from stgt.retrieval.metrics import best_ranks, retrieval_metrics

if TYPE_CHECKING:
    from stgt.interface.inputs import TextTokenizer
    from stgt.interface.model import VideoTextModel

# The model's libraries are imported where they are used, since the driver does not need them.

logger = logging.getLogger(__name__)

CLIPS_AT_A_TIME = 32
MIN_CLIPS = 2

Place = tuple[int, int]
"""Shard and row of a clip."""


def _clips(config: TrainConfig) -> tuple[ClipSource, list[Place]]:
    """Return the source and the places of the validation clips.

    They are the first clips of the validation store, with their original captions, or of the clips
    held out of training, with the captions that training would use. Clips without such captions are
    left out, except with questions, which take the place of captions.
    """
    uri = config.validation_store
    # Answers are always validated on frames.
    with_frames = config.questions is not None or features.validation_folder(config) is None
    if uri is not None:
        source: ClipSource = StoreSource(uri, with_frames=with_frames)
        places = [
            (shard, row) for shard, size in enumerate(source.shard_sizes) for row in range(size)
        ]
    else:
        source = open_source(
            config.data[0],
            config.model.inputs.image_size,
            config.resize,
            frame_rules=config.frame_rules,
            captions=config.captions,
            with_frames=with_frames,
        )
        places = hold_out([source], config.loader).places()
        # All clips of a store have original captions, which is checked before a training starts.
        may_lack_captions = config.captions != "original" or is_manifest(config.data[0])
        if may_lack_captions and config.questions is None:
            places = _with_captions(source, places, config.val_clips)
    return source, places[: config.val_clips]


def _with_captions(source: ClipSource, places: list[Place], most: int) -> list[Place]:
    """Return the places of the clips that have captions, at least `most` if there are so many."""
    found: list[Place] = []
    for shard, inside in itertools.groupby(places, key=lambda place: place[0]):
        counts = source.caption_counts(shard)
        found += [place for place in inside if counts[place[1]]]
        if len(found) >= most:
            break
    return found


def measured_on(config: TrainConfig) -> MeasuredOn:
    """Describe the clips and the protocol of the validation."""
    source, places = _clips(config)
    source.close()
    if config.questions is not None:
        return MeasuredOn(
            clips=len(places),
            content=fingerprint([digest_of(source.uri), places, answers.measured_content(config)]),
            protocol=f"accuracy of answers, {config.num_frames} frames per clip",
        )
    content, which = [digest_of(source.uri), places], "first caption"
    if config.validation_store is None and config.captions != "original":
        content.append(config.captions)
        which = f"first of the {config.captions} captions"
    return MeasuredOn(
        clips=len(places),
        content=fingerprint(content),
        protocol=f"cosine similarity, {which}, {config.num_frames} frames per clip",
    )


@torch.no_grad()
def validate(
    model: VideoTextModel, tokenizer: TextTokenizer, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """Evaluate text-to-video retrieval by cosine similarity on at most `val_clips` clips.

    With questions, the accuracy of answers about these clips is computed instead.

    All workers must call this. Each encodes a part of the clips, and all return the same metrics.
    The model keeps its training mode.

    Raises:
        ClipStoreError: Too few validation clips could be read.
    """
    # Batches of other sizes than in training would take longer to compile than to compute.
    stance = torch.compiler.set_stance("eager_on_recompile") if config.compile else nullcontext()
    with stance:
        return _validate(model, tokenizer, config, device)


def _validate(
    model: VideoTextModel, tokenizer: TextTokenizer, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    from stgt.retrieval.similarity import similarity_matrix

    source, places = _clips(config)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    was_training = model.training
    model.eval()
    if config.questions is not None:
        try:
            return answers.validate_answers(model, tokenizer, config, device, source, places)
        finally:
            source.close()
            model.train(was_training)
    reader = features.validation_reader(config)
    mine: list[tuple[int, np.ndarray, np.ndarray]] = []
    share = list(enumerate(places))[rank::world]
    try:
        for first in range(0, len(share), CLIPS_AT_A_TIME):
            part = share[first : first + CLIPS_AT_A_TIME]
            mine += _encode(model, tokenizer, config, source, part, device, reader)
    finally:
        source.close()
        if reader is not None:
            reader.close()
        model.train(was_training)
    parts: list[Any] = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    encoded = sorted((one for part in parts for one in part), key=lambda one: one[0])
    if len(encoded) < len(places):
        logger.warning(
            "%d of %d validation clips could not be read", len(places) - len(encoded), len(places)
        )
    if len(encoded) < MIN_CLIPS:
        raise ClipStoreError(f"{source.uri}: too few validation clips could be read; see the log")
    similarity = similarity_matrix(
        np.stack([video for _, video, _ in encoded]), np.stack([text for _, _, text in encoded])
    )
    ranks = best_ranks(similarity, [[row] for row in range(len(encoded))])
    found = retrieval_metrics(ranks, "t2v")
    return {f"{config.validation_split}/{name}": value for name, value in found.items()}


def _encode(
    model: VideoTextModel,
    tokenizer: TextTokenizer,
    config: TrainConfig,
    source: ClipSource,
    part: list[tuple[int, Place]],
    device: torch.device,
    reader: TokenReader | None,
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Return (number, video embeddings [Q, E], text embedding [E]) of each readable clip."""
    from stgt.precision import autocast

    numbers, captions, frames = [], [], []
    clips: list[Clip] = []
    # Held-out clips are a few rows of many shards, so only their rows are read.
    for shard, places in itertools.groupby((place for _, place in part), key=lambda one: one[0]):
        clips += source.clips(shard, [row for _, row in places])
    for (number, (shard, row)), clip in zip(part, clips, strict=True):
        try:
            if reader is None:
                even = source.frames(clip, config.num_frames, "uniform", np.random.default_rng(0))
            else:
                chosen = choose_frames(len(clip[FRAME_INDICES]), config.num_frames, "uniform")
                even = place_of(0, shard, row, 0, chosen)
        except VideoDecodeError as error:
            logger.warning("skipping a validation clip: %s", error)
            continue
        numbers.append(number)
        captions.append(clip["captions"][0])
        frames.append(even)
    if not numbers:
        return []
    with autocast(config.precision, device):
        stacked = np.stack(frames)
        videos = model.encode_video(
            torch.from_numpy(stacked).to(device)
            if reader is None
            else reader.read(stacked).to(device)
        )
        tokens = tokenizer(captions, config.model.inputs.max_text_tokens).to(device)
        texts = model.encode_text(tokens).float().cpu().numpy()
    embeds = videos.embeds.float().cpu().numpy()
    return list(zip(numbers, embeds, texts, strict=True))
