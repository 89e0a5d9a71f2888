"""Checks data, initial weights, cluster and disk space before a training starts.

The checks of data and weights need neither Ray nor torch, so they report a wrong setting within
seconds.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.locations import find_checkpoint, find_data
from pipelines.artifacts.manifest import clip_hash
from pipelines.artifacts.vocabulary import open_tokenizer
from pipelines.common import storage, tracking
from pipelines.common.config import flatten
from pipelines.feed.dataset_checks import check_source, digest_of_all
from pipelines.feed.held_out import HeldOut
from pipelines.feed.opening import hold_out, make_plan, open_sources
from pipelines.feed.other_texts import CaptionedSource
from pipelines.feed.plan import TrainPlan
from pipelines.feed.sources import ClipSource, StoreSource
from pipelines.train import answers, features
from pipelines.train.config import TrainConfig
from stgt.dual_encoder.config import UNSET, DualEncoderConfig
from stgt.errors import CheckpointError, ClipStoreError, SettingError
from stgt.field_marks import FieldMark, is_below, marked_fields
from stgt.question_answering.accuracy import ACCURACY, metric_of
from stgt.question_answering.question_types import QUESTION_TYPES
from stgt.retrieval.metrics import retrieval_metrics

logger = logging.getLogger(__name__)

MIN_VALIDATION_CLIPS = 2
EMPTY = np.empty(0, dtype=np.uint64)
NUM_ANSWERS = "num_answers"
"""Field of a model's config: the number of its answers."""
ANSWERING = "answering"
"""Field of a model's config: how it answers."""
NUM_FRAMES = "num_frames"
"""Field of a model's config: the number of frames that it has time embeddings for."""
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""One float32 weight and the two moments of AdamW."""


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute paths of stores and checkpoints."""

    def there(uri: str | None) -> str | None:
        return None if uri is None else storage.resolve(uri)

    def data(uri: str | None) -> str | None:
        return None if uri is None else find_data(uri)

    start = None if config.init_from is None else find_checkpoint(config.init_from)
    vocab = config.vocab
    if not vocab and start is not None:
        vocab = start
    elif Path(vocab).is_file() or (vocab and isinstance(config.model, DualEncoderConfig)):
        # Elsewhere, a folder may have the name of a vocabulary on the hub and must not replace it.
        vocab = storage.resolve(vocab) if Path(vocab).exists() else vocab
    return replace(
        config,
        data=tuple(find_data(uri) for uri in config.data),
        output=storage.resolve(config.output),
        init_from=start,
        features=features.with_absolute_paths(config.features),
        questions=there(config.questions),
        answers=there(config.answers),
        val_questions=there(config.val_questions),
        val_store=data(config.val_store),
        test_store=data(config.test_store),
        cache_dir=there(config.cache_dir),
        vocab=vocab,
        tracking=tracking.resolve(config.tracking),
    )


def with_architecture(config: TrainConfig) -> TrainConfig:
    """Return the config with the architecture of a model that is given by its weights.

    Raises:
        CheckpointError: There are no weights to take it from, or they are of another kind.
    """
    model = config.model
    if not isinstance(model, DualEncoderConfig) or model.architecture != UNSET:
        return config
    if config.init_from is None:
        raise CheckpointError(f"{model.needs_initial_weights}")
    checkpoints.require(config.init_from)
    theirs = checkpoints.model_config(config.init_from)
    if not isinstance(theirs, DualEncoderConfig):
        raise CheckpointError(
            f"{config.init_from} holds {checkpoints.describe(config.init_from)}, but this recipe "
            "trains a dual encoder; give CLIP or SigLIP, or a recipe of that model"
        )
    if theirs.resize != config.resize:
        logger.warning(
            "%s was trained on frames with resize = %s, and this training has %s",
            config.init_from,
            theirs.resize,
            config.resize,
        )
    own = {
        name: getattr(model, name)
        for name in marked_fields(DualEncoderConfig, FieldMark.KEEPS_SHAPES)
    }
    return replace(config, model=replace(theirs, **own))


def with_vocabulary(config: TrainConfig) -> TrainConfig:
    """Return the config with the model sized for its vocabulary."""
    if not config.vocab:
        raise SettingError("vocab is empty, and there is no init_from to take a tokenizer from")
    return replace(config, model=config.model.for_tokenizer(open_tokenizer(config.vocab)))


@dataclass(frozen=True)
class TrainingData:
    """The datasets of a run and the order of their clips."""

    sources: list[ClipSource]
    plan: TrainPlan
    held_out: HeldOut
    digest: str
    """Digest of the contents of all datasets."""
    features: str | None = None
    """Digest of the stored tokens that take the place of frames; None without them."""


def check_data(config: TrainConfig) -> TrainingData:
    """Check that the data suits the run, and plan the order of the clips.

    Raises:
        ClipStoreError: A store is missing, too small, or its frames do not suit the model.
        ManifestError: A manifest cannot be used.
    """
    own_captions = config.questions is None and config.captions == "original"
    digests = [
        check_source(
            uri, config.model.inputs.image_size, config.num_frames, config.resize, own_captions
        )
        for uri in config.data
    ]
    digests += answers.digest_of_questions(config)
    loader = config.loader
    sources = open_sources(loader)
    _check_generated_captions(config, sources)
    held_out = hold_out(sources, loader)
    first = sum(sources[0].shard_sizes)
    if held_out.num_clips >= first:
        videos = f" of {len(held_out.videos)} videos" if held_out.videos else ""
        raise ClipStoreError(
            f"hold_out = {config.hold_out}: {config.data[0]} contains {first} clips{videos}, so "
            "none would be left to train on; lower hold_out or give more videos"
        )
    _check_number_of_validation_clips(config, sources[0], held_out)
    plan = make_plan(sources, loader, held_out)
    answers.check_questions(config, plan)
    _report_clips_without_captions(config, sources, held_out, plan)
    if plan.num_samples < config.global_batch:
        raise ClipStoreError(
            f"{', '.join(config.data)}: {plan.num_samples} {config.samples} to train on, fewer "
            f"than one global batch of {config.global_batch}; lower global_batch or ingest more "
            "clips"
        )
    _check_validation(config)
    digest = digest_of_all(digests)
    return TrainingData(sources, plan, held_out, digest, features.check_features(config))


def _check_number_of_validation_clips(
    config: TrainConfig, source: ClipSource, held_out: HeldOut
) -> None:
    """Refuse a validation that could not be computed, before the first one ends the run."""
    if not config.validates:
        return
    if config.val_clips < MIN_VALIDATION_CLIPS:
        raise SettingError(
            f"val_clips = {config.val_clips}: validation needs at least {MIN_VALIDATION_CLIPS} "
            "clips"
        )
    if config.validation_store is not None:
        return
    if held_out.num_clips < MIN_VALIDATION_CLIPS:
        raise SettingError(
            f"hold_out = {config.hold_out}: validation needs at least {MIN_VALIDATION_CLIPS} "
            "clips; hold out more, or 0 for none"
        )
    if config.questions is None:
        _check_captions_of_held_out(config, source, held_out)


def _check_captions_of_held_out(config: TrainConfig, source: ClipSource, held_out: HeldOut) -> None:
    found = 0
    for shard, rows in held_out.rows.items():
        found += int(np.count_nonzero(source.caption_counts(shard)[rows]))
        if found >= MIN_VALIDATION_CLIPS:
            return  # the other shards need not be read
    raise SettingError(
        f"hold_out = {config.hold_out}: {found or 'none'} of the {held_out.num_clips} held-out "
        f"clips has a caption, and validation needs at least {MIN_VALIDATION_CLIPS} clips with "
        "one; hold out more, or write captions with python -m jobs.caption"
    )


def _check_generated_captions(config: TrainConfig, sources: list[ClipSource]) -> None:
    """Check that there are generated captions if they are asked for.

    Raises:
        ClipStoreError: There are none, or epochs of clips would use clips without any caption.
    """
    captioned = [source for source in sources if isinstance(source, CaptionedSource)]
    if not captioned:
        return
    lacking = [source.uri for source in captioned if not source.has_generated()]
    # Some of several data sets may have only original captions, if these are used as well.
    if lacking and (config.captions == "generated" or len(lacking) == len(captioned)):
        raise ClipStoreError(
            f"{', '.join(lacking)}: no clip has generated captions, which --captions "
            f"{config.captions} trains on; write them with python -m jobs.caption and ingest the "
            "manifest that it writes"
        )
    if config.epoch_unit != "clips":
        return
    for source in captioned:
        with_caption = sum(counts[0] for counts in source.captions_per_shard() if counts)
        without = sum(source.shard_sizes) - with_caption
        if without:
            raise ClipStoreError(
                f"{source.uri}: {without} of {sum(source.shard_sizes)} clips have no caption for "
                f"--captions {config.captions}, and epoch_unit = clips uses every clip; use "
                "--epoch-unit captions, or write their captions with python -m jobs.caption"
            )


def _report_clips_without_captions(
    config: TrainConfig, sources: list[ClipSource], held_out: HeldOut, plan: TrainPlan
) -> None:
    """Log how many clips are left out of epochs of captions because they have none."""
    clips = sum(sum(source.shard_sizes) for source in sources) - held_out.num_clips
    if config.questions is None and config.epoch_unit == "captions" and plan.num_clips < clips:
        logger.warning(
            "%d of the %d clips to train on have no caption and are not used",
            clips - plan.num_clips,
            clips,
        )


def report_repeated_clips(config: TrainConfig, plan: TrainPlan) -> None:
    """Log a warning if a dataset has fewer clips than its share of a batch."""
    turns = config.mix or (1,)
    counts = plan.clips_per_dataset if config.mix else [plan.num_clips]
    for number, (turn, count) in enumerate(zip(turns, counts, strict=True)):
        share = config.global_batch * turn / sum(turns)
        if count < share:
            name = config.data[number] if config.mix else ", ".join(config.data)
            logger.warning(
                "%s has %d clips to train on, but each batch of %d takes approximately %.0f "
                "samples of it, so clips repeat within every batch; lower its number in mix or the "
                "global batch",
                name,
                count,
                config.global_batch,
                share,
            )


def report_shared_videos(config: TrainConfig, data: TrainingData) -> None:
    """Log a warning if validation clips show videos that are also trained on.

    Videos are the same if they have the same URI.
    """
    uri = config.validation_store
    if uri is not None:
        source: ClipSource = StoreSource(uri)
        validated = np.unique(np.concatenate([EMPTY, *_videos(source, None)]))
        where, others = uri, list(range(len(data.sources)))
    elif data.held_out.videos:
        source = data.sources[0]
        held_out = set(data.held_out.videos)
        validated = np.unique(np.concatenate([EMPTY, *_videos(source, held_out)]))
        where, others = "the held-out clips", list(range(1, len(data.sources)))
    else:
        return
    for number in others:
        shared = np.zeros(len(validated), dtype=bool)
        for videos in _videos(data.sources[number], None):  # not all at once: there may be millions
            shared |= np.isin(validated, videos)
        if shared.any():
            logger.warning(
                "%d of the %d videos of %s are also in %s, so validation metrics are too high; "
                "validate on other videos",
                shared.sum(),
                len(validated),
                where,
                data.sources[number].uri,
            )


def _videos(source: ClipSource, only: Set[str] | None) -> Iterator[npt.NDArray[np.uint64]]:
    """Yield hashes of the locations of each shard's videos; `only` selects video ids."""

    def read(shard: int) -> npt.NDArray[np.uint64]:
        uris = {uri for name, uri in source.videos(shard) if only is None or name in only}
        return np.array([clip_hash(uri) for uri in uris], dtype=np.uint64)

    with ThreadPoolExecutor(storage.READERS) as pool:
        yield from pool.map(read, range(len(source.shard_sizes)))


def check_initial_weights(config: TrainConfig) -> None:
    """Check that the initial checkpoint is complete and matches the sizes of the model.

    Raises:
        CheckpointError: It is missing, incomplete, or belongs to a model of another size.
    """
    if config.init_from is None:
        if (reason := config.model.needs_initial_weights) is not None:
            raise CheckpointError(reason)
        return
    checkpoints.require(config.init_from)
    found = checkpoints.model_config(config.init_from)
    if found.kind != config.model.kind:
        raise CheckpointError(
            f"{config.init_from} holds {checkpoints.describe(config.init_from)}, but this run "
            f"trains {config.model.title}; start from a checkpoint of the same kind"
        )
    logger.info("%s holds %s", config.init_from, checkpoints.describe(config.init_from))
    theirs = flatten(json.loads(json.dumps(found.to_dict())))
    ours = flatten(json.loads(json.dumps(config.model.to_dict())))
    shapeless = frozenset(marked_fields(type(config.model), FieldMark.KEEPS_SHAPES))
    if not theirs.get(NUM_ANSWERS):
        shapeless |= {NUM_ANSWERS, ANSWERING}  # a new classifier begins with random weights
    if config.questions is not None:
        shapeless |= {NUM_FRAMES}  # time embeddings are resized, as published
    differing = [
        f"{name} {theirs.get(name)} in the checkpoint, {ours.get(name)} in this run"
        for name in sorted(ours.keys() | theirs.keys())
        if theirs.get(name) != ours.get(name) and not is_below(name, shapeless)
    ]
    if differing:
        raise CheckpointError(
            f"{config.init_from} belongs to a model of another size ({'; '.join(differing)}); set "
            "--model.* to the same sizes, or start from another checkpoint"
        )


def selectable_metrics(config: TrainConfig) -> list[str]:
    """Return the metrics of the validation that can be maximized."""
    if config.questions is not None:
        return [ACCURACY, *(metric_of(name) for name in QUESTION_TYPES)]
    # Only recalls can be maximized; lower ranks are better.
    return [name for name in retrieval_metrics(np.array([1]), "t2v") if "/R" in name]


def _check_validation(config: TrainConfig) -> None:
    """Check that the validation clips suit the model and that the metric exists.

    Raises:
        ClipStoreError: The store is missing or too small, or its frames do not suit the model.
        SettingError: `select_metric` is not a metric that can be maximized.
    """
    uri = config.validation_store
    known = selectable_metrics(config)
    if config.select_metric not in known:
        raise SettingError(
            f"select_metric = {config.select_metric!r}: must be one of {', '.join(known)}"
        )
    if uri is None:
        return
    check_source(uri, config.model.inputs.image_size, 1, config.resize, config.questions is None)
    if ClipStore(uri).num_clips < MIN_VALIDATION_CLIPS:
        raise ClipStoreError(
            f"{uri} contains too few clips for validation; give at least {MIN_VALIDATION_CLIPS}"
        )


def check_cluster(config: TrainConfig) -> None:
    """Check that training workers and data workers fit the cluster.

    Raises:
        SettingError: The cluster has too few CPUs or GPUs.
    """
    from pipelines.common.cluster import (
        require_resources,
    )  # not at the top, so that the other checks do not load Ray

    workers = config.allowed_worker_counts[0]
    least = "" if workers == config.num_workers else ", the minimum allowed"
    feed = ""
    if config.num_loaders:
        feed = f", {config.num_loaders} for data workers, 1 for Ray Data's scheduler tasks"
    needed = {
        "CPU": (
            float(config.num_cpus(workers)),
            f"{workers} workers with {config.threads_per_worker} each{least}{feed}",
        )
    }
    if config.use_gpu:
        needed["GPU"] = (float(workers), f"one per worker{least}")
    require_resources("training", needed, "lower num_workers or num_loaders, or turn off use_gpu")


def check_space(config: TrainConfig, trained_parameters: int) -> None:
    """Check that the output folder has space for a checkpoint.

    Args:
        config: Config of the run.
        trained_parameters: Number of trainable parameters.

    Raises:
        CheckpointError: There is too little space.
    """
    free = storage.free_bytes(config.output)
    needed = trained_parameters * CHECKPOINT_BYTES_PER_PARAMETER
    if free is not None and free < needed:
        raise CheckpointError(
            f"{config.output} has {free / 1e6:.0f} MB of free space, but a checkpoint takes "
            f"{needed / 1e6:.0f} MB; free some space or choose another --output"
        )
