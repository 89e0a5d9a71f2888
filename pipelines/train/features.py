"""Stored tokens of a frozen frame encoder that a training uses in place of frames.

The checks need neither Ray nor torch, except for that of the encoder's weights, which every worker
makes once it has loaded them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from pipelines.artifacts import checkpoints
from pipelines.artifacts.clip_store import ClipStore
from pipelines.artifacts.frame_features import (
    FrameFeatures,
    augment_differences,
    known_encoder,
)
from pipelines.artifacts.locations import is_manifest
from pipelines.common import storage
from pipelines.common.config import fingerprint, to_dict
from pipelines.feed.config import TrainingFeatures
from pipelines.feed.stored_tokens import TokenReader, check_same_layout, open_reader
from pipelines.train.config import TrainConfig
from stgt.errors import SettingError, STGTError

if TYPE_CHECKING:
    from pipelines.feed.loader import Batch
    from stgt.interface.model import VideoTextModel

logger = logging.getLogger(__name__)


def with_absolute_paths(features: TrainingFeatures) -> TrainingFeatures:
    """Return the settings with absolute paths."""
    val_store = features.val_store
    return replace(
        features,
        store=tuple(storage.resolve(uri) for uri in features.store),
        val_store=None if val_store is None else storage.resolve(val_store),
    )


def check_features(config: TrainConfig) -> str | None:
    """Check that the stored tokens are those of this run's data, encoder and augmentation.

    Returns:
        A digest of the tokens; None for a run without stored tokens.

    Raises:
        STGTError: They are of other clips, another encoder or another augmentation.
        SettingError: A data set is a manifest, whose frames are not stored.
    """
    if not config.features.store:
        return None
    opened = [FrameFeatures(uri) for uri in config.features.store]
    check_same_layout(opened)
    for uri, features in zip(config.data, opened, strict=True):
        if is_manifest(uri):
            raise SettingError(
                f"features.store: {uri} is a manifest, whose videos are decoded in every epoch, "
                "and only frames of a clip store have stored tokens; ingest it with python -m "
                "jobs.ingest"
            )
        _check(config, features, uri)
        _check_views(config, features)
        _warn_of_small_cache(config, features)
    if (uri := validation_folder(config)) is not None:
        features = FrameFeatures(uri)
        _check(config, features, config.validation_store or config.data[0])
        if features.views:
            raise STGTError(
                f"features.val_store: {uri} holds augmented views, and validation uses frames as "
                "they are; give features that were written without --views"
            )
    return opened[0].digest if len(opened) == 1 else fingerprint([one.digest for one in opened])


def _check(config: TrainConfig, features: FrameFeatures, store: str) -> None:
    """Check that features are those of a store and of this run's frame encoder."""
    features.check_store(ClipStore(store))
    features.check_shape(config.model.frame_token_shape, config.model.title)
    start = config.init_from
    # Where a checkpoint trained a part of its encoder, it records the fingerprint of the rest.
    if start is not None and checkpoints.model_config(start).frames_are_fixed:
        found = known_encoder(start)
        if found is not None:
            features.check_encoder(found, start)


def _check_views(config: TrainConfig, features: FrameFeatures) -> None:
    wanted = config.features.views
    if wanted is None:
        if features.views:
            raise STGTError(
                f"{features.uri} holds {features.views} augmented views of each clip, and this "
                "training has no augmentation; give features that were written without --views"
            )
        return
    if features.views < wanted:
        raise STGTError(
            f"{features.uri} holds {features.views or 'no'} augmented views of each clip, and "
            f"features.views = {wanted}; write them with python -m jobs.features --views {wanted}"
        )
    if differing := augment_differences(features.facts["augment"], to_dict(config.augment)):
        raise STGTError(
            f"the views in {features.uri} are augmented differently: {differing}; use the same "
            "--augment.* settings, or write views with those of this run"
        )


def _warn_of_small_cache(config: TrainConfig, features: FrameFeatures) -> None:
    largest = max((record["bytes"] for record in features.records), default=0)
    if storage.is_remote(features.uri) and config.cache_bytes < 2 * largest:
        logger.warning(
            "the files in %s have up to %.1f GB, and each node keeps %.1f GB of shards, so files "
            "are fetched again in every epoch; raise --cache-gb to more than %.1f if the disk of "
            "the nodes holds all of them",
            features.uri,
            largest / 1e9,
            config.cache_gb,
            features.num_bytes / 1e9,
        )


def validation_folder(config: TrainConfig) -> str | None:
    """Return the folder with the tokens of the validation clips; None if frames are encoded."""
    features = config.features
    if not config.validates:
        return None
    if features.val_store is not None:
        return features.val_store
    is_held_out = config.validation_store is None
    return features.store[0] if features.store and is_held_out and not features.views else None


def validation_reader(config: TrainConfig) -> TokenReader | None:
    """Open the tokens of the validation clips; None if their frames are encoded."""
    folder = validation_folder(config)
    if folder is None:
        return None
    return open_reader((folder,), config.cache_dir, config.cache_bytes, config.use_gpu)


def reading_tokens(config: TrainConfig) -> Callable[[Batch], Batch]:
    """Return a function that adds the tokens of its clips to a batch.

    The files are opened with the first batch.
    """
    opened: list[TokenReader] = []

    def read(batch: Batch) -> Batch:
        if any(batch["error"]):
            return batch  # raised by whoever takes the batch
        if not opened:
            folders = config.features.store
            opened.append(
                open_reader(folders, config.cache_dir, config.cache_bytes, config.use_gpu)
            )
        assert "stored" in batch, "data workers say where tokens are"
        batch["tokens"] = opened[0].read(batch["stored"])
        return batch

    return read


def check_encoder(config: TrainConfig, model: VideoTextModel) -> None:
    """Check on a worker that stored tokens are those of the encoder that it has loaded.

    Raises:
        STGTError: They are those of another encoder.
    """
    if not config.features.store:
        return
    encoder = model.frame_encoder
    assert encoder is not None, "checked by the config"
    assert model.frames_are_fixed, "checked by the config"
    assert encoder.fingerprint is not None, "computed when weights are loaded"
    where = str(config.init_from)  # without it, no encoder is frozen
    for uri in {*config.features.store, *filter(None, [validation_folder(config)])}:
        FrameFeatures(uri).check_encoder(encoder.fingerprint, where)
