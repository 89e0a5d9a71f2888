"""Trains the best setting of a sweep again: on its own, or on the validation clips as well."""

from __future__ import annotations

import logging
import shlex
from dataclasses import replace

from pipelines.common import storage
from pipelines.common.output_folder import CONFIG
from pipelines.sweep.config import SweepConfig
from pipelines.sweep.journal import TRIALS
from pipelines.train.config import TrainConfig, TrainingFeatures

logger = logging.getLogger(__name__)

REFIT = "refit"


def reproduce(config: SweepConfig, name: str) -> str:
    """Return the command that trains a trial's setting again, on its own."""
    recorded = storage.join(config.output, TRIALS, name, CONFIG)
    again = storage.join(config.output, f"{name}_again")
    uri = config.train.tracking.uri
    tracked = [] if uri is None else ["--tracking.uri", uri]
    words = ["--config", recorded, "--output", again, "--name", f"{name}_again", *tracked]
    return shlex.join(["python", "-m", "jobs.train", *words])


def refit_config(config: SweepConfig, best: TrainConfig) -> TrainConfig:
    """Return the config that trains a setting on training and validation clips.

    No clips are left to validate on, so the last checkpoint is taken. A setting in epochs keeps
    its epochs, and one in steps its steps.
    """
    added = () if best.val_store is None else (best.val_store,)
    mix = best.mix and (*best.mix, 1)
    return replace(
        best,
        name=REFIT,
        # A folder per trial: another one may be the best after failed ones are retried.
        output=storage.join(config.output, REFIT, best.name),
        data=(*best.data, *added),
        mix=mix if added else best.mix,
        features=_with_validation_clips(best) if added else replace(best.features, val_store=None),
        val_store=None,
        test_store=None,
        hold_out=0,
        select_on="last",
    )


def _with_validation_clips(best: TrainConfig) -> TrainingFeatures:
    """Return where the stored tokens of training and validation clips are."""
    stored = best.features
    if stored.store and stored.val_store is not None and stored.views is None:
        return replace(stored, store=(*stored.store, stored.val_store), val_store=None)
    if stored.store:
        logger.warning(
            "refit encodes frames, since the validation clips have no stored tokens%s",
            "" if stored.views is None else " of augmented views",
        )
    return replace(stored, store=(), val_store=None, views=None)
