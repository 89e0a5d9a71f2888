"""Checks data, initial weights, cluster and disk space before a training starts.

The checks of data and weights need neither Ray nor torch, so they report a wrong setting within
seconds.
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

MIN_VALIDATION_CLIPS = 2
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""One float32 weight and the two moments of AdamW."""


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return the config with absolute paths."""

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
    """Return the config with the model sized for its vocabulary."""
    tokenizer = Tokenizer(config.vocab)
    model = config.model.for_vocabulary(tokenizer.bos_id, len(tokenizer), tokenizer.pad_id)
    return replace(config, model=model)


def check_data(config: TrainConfig) -> tuple[TrainPlan, str]:
    """Check that the data suits the run, and return the sample plan and a digest of the clips.

    Raises:
        ClipStoreError: A store is missing, too small, or its frames do not suit the model.
        ManifestError: A manifest cannot be used.
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
            f"hold_out = {config.hold_out}: {config.data[0]} contains {first} clips, so none would "
            "be left to train on; lower hold_out"
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
    """Check that the initial checkpoint is complete and matches the sizes of the model.

    Raises:
        CheckpointError: It is missing, incomplete, or belongs to a model of another size.
    """
    if config.init_from is None:
        if config.model.vision.frozen:
            raise CheckpointError(
                "model.vision.frozen is set without init_from, so the frame encoder would keep its "
                "random weights; set init_from to a checkpoint with trained weights, or set "
                "model.vision.frozen = False"
            )
        return
    checkpoints.require(config.init_from)
    theirs = flatten(storage.read_json(storage.join(config.init_from, "config.json"))["model"])
    ours = flatten(json.loads(json.dumps(config.model.to_dict())))
    shapeless = frozenset(marked_fields(ModelConfig, FieldMark.KEEPS_SHAPES))
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


def _check_validation(config: TrainConfig) -> None:
    """Check that the validation clips suit the model and that the metric exists.

    Raises:
        ClipStoreError: The store is missing or too small, or its frames do not suit the model.
        ValueError: `select_metric` is not a metric that can be maximized.
    """
    uri = config.validation_store
    # Only recalls can be maximized; lower ranks are better.
    known = [name for name in retrieval_metrics(np.array([1]), "t2v") if "/R" in name]
    if config.select_metric not in known:
        raise ValueError(
            f"select_metric = {config.select_metric!r}: must be one of {', '.join(known)}"
        )
    if uri is None:
        return
    check_source(uri, config.model.vision.image_size, 1, config.resize)
    if ClipStore(uri).num_clips < MIN_VALIDATION_CLIPS:
        raise ClipStoreError(
            f"{uri} contains too few clips for validation; give at least {MIN_VALIDATION_CLIPS}"
        )


def check_cluster(config: TrainConfig) -> None:
    """Check that training workers and data workers fit the cluster.

    Raises:
        ValueError: The cluster has too few CPUs or GPUs.
    """
    from pipelines.common.cluster import (
        require_resources,
    )  # not at the top, so that the other checks do not load Ray

    workers = config.allowed_worker_counts[0]
    least = "" if workers == config.num_workers else ", the minimum allowed"
    needed = {
        "CPU": (
            float(config.num_cpus(workers)),
            f"{workers} workers with {config.threads_per_worker} each{least}, {config.num_loaders} "
            "for data workers, 1 for Ray Data's scheduler tasks",
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
