"""Finds the MLflow run that trained a checkpoint, by the record in the folder of its training."""

from __future__ import annotations

from pipelines.artifacts.checkpoints import CHECKPOINTS
from pipelines.common import storage
from pipelines.common.config import without_credentials
from pipelines.common.output_folder import RUN
from pipelines.common.provenance import Origin


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
