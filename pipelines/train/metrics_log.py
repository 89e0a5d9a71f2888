"""Keeps the metrics of every step beside the checkpoints and sends them to MLflow.

Layout below the run's folder:
    metrics/00000100.json   metrics of the steps after the previous checkpoint, up to step 100

A file is sent only once the checkpoint of its step is complete, so steps that are repeated after a
crash are recorded once. If MLflow is unreachable, the files are sent later.
"""

from __future__ import annotations

import logging
from typing import TypedDict

from pipelines.common import storage
from pipelines.common.tracking import Run, StepMetrics, UnreachableError

logger = logging.getLogger(__name__)

FOLDER = "metrics"


class Sent(TypedDict):
    """Result of sending metrics to MLflow."""

    complete: bool
    step: int


def _uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, FOLDER, f"{step:08d}.json")


def steps(run_uri: str) -> list[int]:
    """Return the last step of each metrics file, in ascending order."""
    names = storage.list_names(storage.join(run_uri, FOLDER))
    return [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]


def write(run_uri: str, rows: list[StepMetrics]) -> None:
    """Write the metrics of the steps since the last checkpoint."""
    storage.write_json(_uri(run_uri, rows[-1]["step"]), rows)


def read(run_uri: str, step: int) -> list[StepMetrics]:
    """Return the metrics of the steps between the previous checkpoint and this one, if any."""
    uri = _uri(run_uri, step)
    return storage.read_json(uri) if storage.exists(uri) else []


def forget_after(run_uri: str, step: int) -> None:
    """Delete the metrics of steps that will be repeated."""
    for later in steps(run_uri):
        if later > step:
            storage.remove(_uri(run_uri, later))


def send(run_uri: str, run: Run, upto: int) -> Sent:
    """Send the metrics that MLflow lacks, up to the step of a complete checkpoint.

    If MLflow is unreachable, this logs a warning and the next call sends the rest.
    """
    reached = 0
    try:
        reached = run.logged_step()
        for step in steps(run_uri):
            if reached < step <= upto:
                run.log_steps(read(run_uri, step), logged_step=step)
                reached = step
    except UnreachableError as error:
        logger.warning(
            "%s; metrics after step %d are kept in %s and will be sent once MLflow is reachable",
            error,
            reached,
            storage.join(run_uri, FOLDER),
        )
        return Sent(complete=False, step=reached)
    return Sent(complete=True, step=reached)
