"""Metrics of a training, step by step, kept beside its checkpoints until MLflow has them.

Layout below the run's folder:
    metrics/00000100.json   metrics of the steps up to 100, since the checkpoint before

A file counts once the checkpoint of its step is complete, so steps that are repeated after a crash
are recorded once, and an MLflow server that cannot be reached gets them later.
"""

from __future__ import annotations

import logging
from typing import TypedDict

from pipelines.common import storage
from pipelines.common.tracking import Run, StepMetrics, UnreachableError

logger = logging.getLogger(__name__)

FOLDER = "metrics"


class Sent(TypedDict):
    """How far MLflow is."""

    complete: bool
    step: int


def _uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, FOLDER, f"{step:08d}.json")


def steps(run_uri: str) -> list[int]:
    """Steps that end a file of metrics, ascending."""
    names = storage.list_names(storage.join(run_uri, FOLDER))
    return [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]


def write(run_uri: str, rows: list[StepMetrics]) -> None:
    """Keep the metrics of the steps since the last checkpoint."""
    storage.write_json(_uri(run_uri, rows[-1]["step"]), rows)


def read(run_uri: str, step: int) -> list[StepMetrics]:
    """Metrics of the steps up to a checkpoint's, since the one before; none before the first."""
    uri = _uri(run_uri, step)
    return storage.read_json(uri) if storage.exists(uri) else []


def forget_after(run_uri: str, step: int) -> None:
    """Delete what belongs to steps that are done again."""
    for later in steps(run_uri):
        if later > step:
            storage.remove(_uri(run_uri, later))


def send(run_uri: str, run: Run, upto: int) -> Sent:
    """Send what MLflow does not have yet, up to a complete checkpoint's step.

    What cannot be sent now is said, and sent at the next call.
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
            "%s; metrics after step %d are kept in %s and sent when it can be reached",
            error,
            reached,
            storage.join(run_uri, FOLDER),
        )
        return Sent(complete=False, step=reached)
    return Sent(complete=True, step=reached)
