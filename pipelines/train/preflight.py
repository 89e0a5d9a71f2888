"""Checks before a training starts: data, initial weights, cluster, disk space.

Those of data and weights need neither Ray nor torch, so a wrong setting is refused within seconds.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.common import storage, tracking
from pipelines.common.config import flatten
from pipelines.feed.plan import TrainPlan
from pipelines.feed.sources import check_source, digest_of_all, make_plan, open_sources
from pipelines.train.config import TrainConfig
from stgt.config import ModelConfig
from stgt.errors import CheckpointError, ClipStoreError
from stgt.field_marks import FieldMark, is_below, marked_fields
from stgt.inputs.tokenizer import Tokenizer
from stgt.retrieval.metrics import retrieval_metrics

LEAST_VALIDATION_CLIPS = 2
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""A float32 weight and AdamW's two moments."""


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The same config with absolute paths."""

    def there(uri: str | None) -> str | None:
        return None if uri is None else storage.resolve(uri)

    vocab = storage.resolve(config.vocab) if Path(config.vocab).is_file() else config.vocab
    return replace(
        config,
        data=tuple(storage.resolve(uri) for uri in config.data),
        output=storage.resolve(config.output),
        init_from=there(config.init_from),
        val_store=there(config.val_store),
        test_store=there(config.test_store),
        cache_dir=there(config.cache_dir),
        vocab=vocab,
        tracking=tracking.resolve(config.tracking),
    )


def with_vocabulary(config: TrainConfig) -> TrainConfig:
    """The same config with the model's sizes for its vocabulary."""
    tokenizer = Tokenizer(config.vocab)
    model = config.model.for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    return replace(config, model=model)


def check_data(config: TrainConfig) -> tuple[TrainPlan, str]:
    """The plan of a training, and a digest of its clips, once they are found to suit it.

    Raises:
        ClipStoreError: a store is missing, too small, or holds other frames than needed.
        ManifestError: a manifest cannot be used.
    """
    digests = [
        check_source(uri, config.model.vision.image_size, config.num_frames, config.resize)
        for uri in config.data
    ]
    loader = config.loader
    sources = open_sources(loader)
    first = sum(sources[0].shard_sizes)
    if config.hold_out >= first:
        raise ClipStoreError(
            f"hold_out = {config.hold_out}: {config.data[0]} holds {first} clips; none would be "
            "left to train on"
        )
    plan = make_plan(sources, loader)
    if plan.num_clips < config.global_batch:
        raise ClipStoreError(
            f"{', '.join(config.data)}: {plan.num_clips} clips to train on, fewer than one global "
            f"batch of {config.global_batch}; lower global_batch or ingest more clips"
        )
    _check_validation(config)
    return plan, digest_of_all(digests)


def check_initial_weights(config: TrainConfig) -> None:
    """Check that the checkpoint to begin with is whole, and of this model's sizes."""
    if config.init_from is None:
        if config.model.vision.frozen:
            raise CheckpointError(
                "model.vision.frozen without init_from: the frame encoder would stay at random; "
                "give init_from a folder with its weights, or set model.vision.frozen = False"
            )
        return
    checkpoints.require(config.init_from)
    theirs = flatten(storage.read_json(storage.join(config.init_from, "config.json"))["model"])
    ours = flatten(json.loads(json.dumps(config.model.to_dict())))
    shapeless = frozenset(marked_fields(ModelConfig, FieldMark.KEEPS_SHAPES))
    differing = [
        f"{name} {theirs.get(name)} there, {ours.get(name)} here"
        for name in sorted(ours.keys() | theirs.keys())
        if theirs.get(name) != ours.get(name) and not is_below(name, shapeless)
    ]
    if differing:
        raise CheckpointError(
            f"{config.init_from} is of a model of another size ({'; '.join(differing)}); set "
            "--model.* to its sizes, or begin with another checkpoint"
        )


def _check_validation(config: TrainConfig) -> None:
    """Check that validation clips suit the model.

    Raises:
        ClipStoreError: the store is missing, or holds other frames than the model takes.
        ValueError: more clips are held out than there are, or the metric has no such name.
    """
    uri = config.validation_store
    # Of ranks, less is better.
    known = [name for name in retrieval_metrics(np.array([1]), "t2v") if "/R" in name]
    if config.select_metric not in known:
        raise ValueError(
            f"select_metric = {config.select_metric!r}: must be one of {', '.join(known)}"
        )
    if uri is None:
        return
    check_source(uri, config.model.vision.image_size, 1, config.resize)
    if ClipStore(uri).num_clips < LEAST_VALIDATION_CLIPS:
        raise ClipStoreError(
            f"{uri} holds too few clips to validate on; it takes {LEAST_VALIDATION_CLIPS}"
        )


def check_cluster(config: TrainConfig) -> None:
    """Check that training workers and data workers fit the cluster.

    Raises:
        ValueError: they do not; it says what is missing.
    """
    from pipelines.common.cluster import require_resources  # the other checks load no Ray

    workers = config.allowed_worker_counts[0]
    least = "" if workers == config.num_workers else ", the fewest allowed"
    needed = {
        "CPU": (
            float(config.num_cpus(workers)),
            f"{workers} workers of {config.threads_per_worker}{least}, {config.num_loaders} data "
            "workers, 1 for Ray Data's scheduler tasks",
        )
    }
    if config.use_gpu:
        needed["GPU"] = (float(workers), f"one per worker{least}")
    require_resources("training", needed, "lower num_workers or num_loaders, or leave use_gpu off")


def check_space(config: TrainConfig, trained_parameters: int) -> None:
    """Check that there is space for a checkpoint.

    Args:
        config: the training.
        trained_parameters: number of parameters that are trained.

    Raises:
        CheckpointError: there is not.
    """
    free = storage.free_bytes(config.output)
    needed = trained_parameters * CHECKPOINT_BYTES_PER_PARAMETER
    if free is not None and free < needed:
        raise CheckpointError(
            f"{config.output} has {free / 1e6:.0f} MB of free space, a checkpoint takes "
            f"{needed / 1e6:.0f} MB; free some or choose another --output"
        )
