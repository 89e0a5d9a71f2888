"""Stores the tokens of a frozen frame encoder for every frame of a clip store.

A shard of the store is the unit of work. Its file is written whole and its record last, so a run
that is killed continues with the missing shards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore, recorded_sampling
from pipelines.artifacts.frame_features import (
    FEATURES,
    SHARDS,
    FeatureRecord,
    FrameFeatures,
    TokenLayout,
    features_digest,
    known_encoder,
    record_uri,
    shard_uri,
)
from pipelines.artifacts.locations import find_checkpoint, find_data, is_manifest
from pipelines.common import storage
from pipelines.common.config import to_dict
from pipelines.common.lease import exclusive
from pipelines.common.output_folder import CONFIG, claim_folder, config_record, settings_of
from pipelines.feed.dataset_checks import check_frames
from pipelines.feed.features.config import DEFAULT_WORKERS, FeaturesConfig
from stgt.errors import CheckpointError, SettingError, STGTError
from stgt.field_marks import FieldMark, marked_fields
from stgt.interface.inputs import VideoTextConfig

logger = logging.getLogger(__name__)

LABEL = "features"
SMALL_MODEL_BYTES = 50_000_000
SMALL_NUM_FRAMES = 4096
"""Up to these sizes of weights and store, one process is done before Ray has started workers."""
SHOWN = 5
"""Maximum number of damaged files to name in an error."""
HASHERS = 4
"""Files that are read at the same time to verify them."""


class FeaturesSummary(TypedDict):
    """Result of `run_features`."""

    output: str
    clips: int
    frames: int
    """Stored frames of all clips; each has a row per view."""
    views: int
    """Augmented views of each clip; 0 if frames are stored as they are."""
    bytes: int
    """Size of all files of tokens."""
    encoder: str
    """Fingerprint of the frame encoder."""
    seconds: float


@dataclass(frozen=True)
class _Inputs:
    """What is encoded, and by which model."""

    config: FeaturesConfig
    store: ClipStore
    model: VideoTextConfig
    layout: TokenLayout
    record: dict[str, Any]
    """Settings, as they are written into the output folder."""

    @property
    def frame_bytes(self) -> int:
        """Size of all views of a stored frame, in bytes."""
        return self.layout.frame_bytes * max(1, self.config.views)


def run_features(
    config: FeaturesConfig, connect: Callable[[FeaturesConfig], None] | None = None
) -> FeaturesSummary:
    """Store the features of a clip store, or verify those that are stored.

    Args:
        config: What to store.
        connect: Called once before Ray is needed, after all checks that do not need Ray.

    Raises:
        ClipStoreError: The store cannot be used, or its frames do not suit the model.
        CheckpointError: The checkpoint cannot be used, or its model has no frame encoder.
        STGTError: The output holds other features, a file is damaged, or there is too little space.
    """
    started = time.monotonic()
    inputs = _opened(config)
    folder = inputs.config.output
    with exclusive(folder):
        if inputs.config.verify:
            features = _verified(inputs)
        else:
            _claim(inputs)
            _write(inputs, connect)
            features = FrameFeatures(folder)
    return FeaturesSummary(
        output=folder,
        clips=sum(record["clips"] for record in features.records),
        frames=sum(record["frames"] for record in features.records),
        views=features.views,
        bytes=features.num_bytes,
        encoder=features.encoder,
        seconds=round(time.monotonic() - started, 1),
    )


def _opened(config: FeaturesConfig) -> _Inputs:
    """Check the inputs, without Ray and torch."""
    config = replace(
        config,
        store=find_data(config.store),
        checkpoint=find_checkpoint(config.checkpoint),
        output=storage.resolve(config.output),
    )
    if is_manifest(config.store):
        raise SettingError(
            f"store = {config.store!r}: is a manifest, whose frames are not stored; ingest it with "
            "python -m jobs.ingest and give the store"
        )
    checkpoints.require(config.checkpoint)
    model = checkpoints.model_config(config.checkpoint)
    shape = model.frame_token_shape
    if shape is None:
        raise CheckpointError(
            f"{config.checkpoint} holds {checkpoints.describe(config.checkpoint)}, which has no "
            "frame encoder that stays frozen in training, so its tokens cannot be stored; give a "
            "checkpoint of STGT"
        )
    logger.info("%s holds %s", config.checkpoint, checkpoints.describe(config.checkpoint))
    if not model.frames_are_fixed:
        logger.warning(
            "the model in %s was trained with its frame encoder; features of it suit evaluations "
            "of this checkpoint, and trainings that begin with it and freeze the encoder "
            "(--model.vision.frozen --model.vision.unfreeze-last-blocks 0)",
            config.checkpoint,
        )
    store = ClipStore(config.store)
    check_frames(store, model.inputs.image_size, 1, store.sampling.resize)
    # Another checkpoint with the same encoder may continue.
    encoder = known_encoder(config.checkpoint) if model.frames_are_fixed else None
    facts = {"encoder": encoder or checkpoints.weights_version(config.checkpoint)}
    record = config_record(LABEL, replace(config, verify=False), **facts)
    return _Inputs(config, store, model, TokenLayout(config.format, *shape), record)


def _claim(inputs: _Inputs) -> None:
    """Record the settings in the output folder, so that features are never mixed."""
    now = settings_of(inputs.record)

    def refuse(found: Mapping[str, Any], differing: list[str]) -> STGTError:
        before = settings_of(found)
        said = "; ".join(f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in differing)
        if found.get("job") != LABEL:
            said = "files of another job"
        return STGTError(
            f"{inputs.config.output} holds other features ({said}); choose another --output, or "
            "delete this folder"
        )

    marks = (FieldMark.OPERATIONAL, FieldMark.LOCATION, FieldMark.LOCATION_OR_NAME)
    ignored = frozenset(name for mark in marks for name in marked_fields(FeaturesConfig, mark))
    place = storage.join(inputs.config.output, CONFIG)
    foreign = storage.exists(place) and storage.read_json(place).get("job") != LABEL
    claim_folder(
        inputs.config.output,
        CONFIG,
        inputs.record,
        refuse,
        # A foreign record differs in its job, which is not among the settings.
        compared=lambda one: {**settings_of(one), "job": one.get("job")},
        ignored=ignored,
        has_results=foreign or bool(_finished(inputs.config.output)),
    )


def _finished(folder: str) -> dict[int, FeatureRecord]:
    """Read the records of the finished shards whose files have their recorded sizes."""
    place = storage.join(folder, SHARDS)
    names = [name for name in storage.list_names(place) if name.endswith(".json")]
    records: list[FeatureRecord] = storage.read_jsons(place, names)

    def is_whole(record: FeatureRecord) -> bool:
        uri = shard_uri(folder, record["shard"])
        return storage.exists(uri) and storage.size_bytes(uri) == record["bytes"]

    with ThreadPoolExecutor(storage.READERS) as pool:
        whole = list(pool.map(is_whole, records))
    return {one["shard"]: one for one, there in zip(records, whole, strict=True) if there}


def _write(inputs: _Inputs, connect: Callable[[FeaturesConfig], None] | None) -> None:
    """Write the shards that are missing or have changed in the store, and the facts last."""
    config, store = inputs.config, inputs.store
    records = _finished(config.output)
    count = len(store.shard_sizes)
    pending = [
        shard
        for shard in range(count)
        if shard not in records or records[shard]["store_sha256"] != store.shard_key(shard)
    ]
    facts_uri = storage.join(config.output, FEATURES)
    if not pending and storage.exists(facts_uri):
        facts = storage.read_json(facts_uri)
        if facts["store_digest"] == store.catalogue["digest"]:
            logger.info("%s is already complete; use --verify to check it", config.output)
            return
    _announce(inputs, pending)
    storage.remove(facts_uri)  # of an earlier state of the store
    _remove_unfinished(config.output)
    if pending:
        _encode(inputs, pending, connect)
        records = _finished(config.output)
    found = [records[shard] for shard in range(count)]
    for shard in records.keys() - set(range(count)):  # of a store that had more shards
        storage.remove(record_uri(config.output, shard))
        storage.remove(shard_uri(config.output, shard))
    storage.write_json(facts_uri, _facts(inputs, found))


def _announce(inputs: _Inputs, pending: list[int]) -> None:
    """Log the size of the features, and check that there is space for what is missing.

    Raises:
        STGTError: The disk has too little free space.
    """
    config, store = inputs.config, inputs.store
    each = store.sampling.num_frames * inputs.frame_bytes
    left = sum(store.shard_sizes[shard] for shard in pending) * each
    views = f"{config.views} views of " if config.views else ""
    logger.info(
        "features of %s clips take %s: %s%d frames each, and %s per frame (%d tokens of width %d "
        "in %s); %s are to be written",
        f"{store.num_clips:,}",
        _size(store.num_clips * each),
        views,
        store.sampling.num_frames,
        _size(inputs.layout.frame_bytes),
        inputs.layout.tokens,
        inputs.layout.width,
        config.format,
        _size(left),
    )
    free = storage.free_bytes(config.output)
    if free is not None and free < left:
        raise STGTError(
            f"{config.output} has {_size(free)} of free space, but the features take "
            f"{_size(left)} more; choose another --output, fewer --views, or --format fp8"
        )


def _size(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e4 else f"{count / 1e3:.2f} KB"


def _remove_unfinished(folder: str) -> None:
    """Delete files that a killed run has not finished. Nobody else writes into the folder."""
    place = storage.join(folder, SHARDS)
    for name in storage.list_names(place):
        if name.startswith(".") and name.endswith(".tmp"):
            storage.remove(storage.join(place, name))


def _encode(
    inputs: _Inputs, pending: list[int], connect: Callable[[FeaturesConfig], None] | None
) -> None:
    """Encode shards on Ray or, if they are small, in this process."""
    config, sizes = inputs.config, inputs.store.shard_sizes
    runs_here = _runs_here(inputs, sum(sizes[shard] for shard in pending))
    if connect is not None and not runs_here:
        connect(config)
    from pipelines.common import parts
    from pipelines.common.progress import Progress
    from pipelines.feed.features.worker import FeatureWriter

    done = inputs.store.num_clips - sum(sizes[shard] for shard in pending)
    if done:
        logger.info("features: %s of %s clips are there", f"{done:,}", f"{sum(sizes):,}")
    progress = Progress(LABEL, inputs.store.num_clips, "clips", done)
    items = [{"shard": shard} for shard in pending]
    if runs_here:
        rows = parts.in_this_process(FeatureWriter, (config,), items)
    else:
        workers = config.num_workers or DEFAULT_WORKERS
        rows = parts.on_ray(
            LABEL, FeatureWriter, (config,), items, num_workers=workers, use_gpu=config.use_gpu
        )
    for row in rows:
        progress.advance(int(row["count"]))


def _runs_here(inputs: _Inputs, clips: int) -> bool:
    config = inputs.config
    if config.num_workers is not None or config.use_gpu:
        return False
    frames = clips * inputs.store.sampling.num_frames * max(1, config.views)
    return (
        frames <= SMALL_NUM_FRAMES
        and checkpoints.weights_bytes(config.checkpoint) <= SMALL_MODEL_BYTES
    )


def _facts(inputs: _Inputs, records: list[FeatureRecord]) -> dict[str, Any]:
    """Return the content of `features.json`.

    Raises:
        STGTError: Shards were encoded by different encoders.
    """
    config, store = inputs.config, inputs.store
    encoders = sorted({record["encoder"] for record in records})
    if len(encoders) != 1:
        raise STGTError(
            f"the shards in {config.output} were written with different frame encoders "
            f"({', '.join(encoders)}), because the weights in {config.checkpoint} changed in the "
            "meantime; delete this folder and run the same command again"
        )
    facts: dict[str, Any] = {
        "encoder": encoders[0],
        "model": inputs.model.kind,
        "checkpoint": config.checkpoint,
        "image_size": inputs.model.inputs.image_size,
        "mean": list(inputs.model.inputs.mean),
        "std": list(inputs.model.inputs.std),
        "precision": config.precision,
        "format": config.format,
        "shape": [inputs.layout.tokens, inputs.layout.width],
        "views": config.views,
        "augment": to_dict(config.augment) if config.views else None,
        "seed": config.seed if config.views else None,
        "store": store.uri,
        "store_digest": store.catalogue["digest"],
        "sampling": recorded_sampling(store.sampling),
        "shards": records,
    }
    return {**facts, "digest": features_digest(facts)}


def _verified(inputs: _Inputs) -> FrameFeatures:
    """Check that all files of finished features are as they were written.

    Raises:
        STGTError: Files are missing or damaged, or the features are not those of the store.
    """
    features = FrameFeatures(inputs.config.output)
    features.check_store(inputs.store)

    def problem(record: FeatureRecord) -> str | None:
        uri = shard_uri(features.uri, record["shard"])
        if not storage.exists(uri):
            return f"{uri} is missing"
        if storage.digest(uri) != record["sha256"]:
            return f"{uri} has changed: its checksum differs from the record"
        return None

    from pipelines.common.progress import Progress

    progress = Progress("verify", len(features.records), "files")
    problems = []
    with ThreadPoolExecutor(HASHERS) as pool:
        for found in pool.map(problem, features.records):
            progress.advance(1)
            if found is not None:
                problems.append(found)
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise STGTError(
            f"{len(problems)} of {len(features.records)} files failed verification: "
            f"{'; '.join(problems[:SHOWN])}{more}; delete these files and run the same command "
            "without --verify, which writes them again"
        )
    logger.info("all %d files are as they were written", len(features.records))
    return features
