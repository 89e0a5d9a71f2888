"""Finds the run that trained a checkpoint, and its data, by the records in the run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.checkpoints import CHECKPOINTS
from pipelines.artifacts.locations import find_checkpoint
from pipelines.common import storage
from pipelines.common.config import without_credentials
from pipelines.common.output_folder import CONFIG, RUN, settings_of
from pipelines.common.provenance import Origin

MOST_ANCESTORS = 10
"""Number of trainings that are followed back from a checkpoint."""


def origin_of(checkpoint: str) -> Origin:
    """Return a checkpoint with the run that trained it, if its folder lies in that of a training.

    Args:
        checkpoint: Absolute URI of a checkpoint. Imported weights and copies have no run.
    """
    folder = checkpoint.rstrip("/").rpartition("/")[0]
    run = folder.removesuffix(f"/{CHECKPOINTS}")
    record_uri = storage.join(run, RUN)
    if run == folder or not storage.exists(record_uri):
        return Origin(checkpoint)
    record = storage.read_json(record_uri)
    return Origin(checkpoint, record["run_id"], without_credentials(record["tracking_uri"]))


@dataclass(frozen=True)
class TrainingData:
    """The data that a checkpoint was trained on."""

    uris: tuple[str, ...]
    """Clip stores and manifests of its training, and of those that it continues."""
    unknown: str | None = None
    """What is not known of earlier trainings, in words; None if nothing is missing."""


def training_data_of(checkpoint: str) -> TrainingData:
    """Return the training data that are recorded with a checkpoint and those that it began with.

    Args:
        checkpoint: Absolute URI of a checkpoint.
    """
    found: list[str] = []
    for _ in range(MOST_ANCESTORS):
        settings = _settings_of_training(checkpoint)
        if settings is None:
            return TrainingData(
                tuple(dict.fromkeys(found)), f"what {checkpoint} was trained on is not recorded"
            )
        data = settings.get("data") or ()
        found += [data] if isinstance(data, str) else data
        before = settings.get("init_from")
        if not before:
            return TrainingData(tuple(dict.fromkeys(found)))
        checkpoint = find_checkpoint(before)
    return TrainingData(tuple(dict.fromkeys(found)), f"what came before {checkpoint} was not read")


def _settings_of_training(checkpoint: str) -> dict[str, Any] | None:
    """Return the settings of the training that wrote a checkpoint; None if it lies in none."""
    folder = checkpoint.rstrip("/").rpartition("/")[0]
    run = folder.removesuffix(f"/{CHECKPOINTS}")
    uri = storage.join(run, CONFIG)
    if run == folder or not storage.exists(uri):
        return None
    return settings_of(storage.read_json(uri))
