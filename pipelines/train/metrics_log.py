"""Keeps the metrics of every step beside the checkpoints, until MLflow has them and afterwards.

Layout below the run's folder:
    metrics/00000100.json   metrics of the steps after the previous checkpoint, up to step 100

`metrics_sender` sends them, and earlier the metrics of steps after the last checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from pipelines.common import storage
from pipelines.common.tracking import LoggedSteps, StepMetrics, is_late

FOLDER = "metrics"
EARLIER_NAMES = {
    "samples/skipped": "data/skipped",
    "samples/without_negative": "data/without_negative",
    "resources/gpu_memory_gb": "gpu/memory_gb",
    "resources/gpu_utilization": "gpu/utilization",
}
"""Names that runs of earlier versions began with, `metric_names = 1` in their config."""


class MeasuredOn(TypedDict):
    """What a validation metric was measured on. Only metrics of the same set are compared."""

    clips: int
    content: str
    """Digest of the clips."""
    protocol: str


class StepRecord(StepMetrics, total=False):
    """Metrics of a step, as kept beside the checkpoint."""

    measured_on: MeasuredOn
    """What validation metrics were measured on; missing without validation."""


def name_for(metric: str, names: int) -> str:
    """Return the name of a metric in a run.

    Args:
        metric: Today's name.
        names: The run's `metric_names`.
    """
    return EARLIER_NAMES.get(metric, metric) if names == 1 else metric


def _uri(run_uri: str, step: int) -> str:
    return storage.join(run_uri, FOLDER, f"{step:08d}.json")


def steps(run_uri: str) -> list[int]:
    """Return the last step of each metrics file, in ascending order."""
    names = storage.list_names(storage.join(run_uri, FOLDER))
    return [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]


def write(run_uri: str, rows: list[StepRecord]) -> None:
    """Write the metrics of the steps since the last checkpoint."""
    storage.write_json(_uri(run_uri, rows[-1]["step"]), rows)


def read(run_uri: str, step: int) -> list[StepRecord]:
    """Return the metrics of the steps between the previous checkpoint and this one, if any."""
    uri = _uri(run_uri, step)
    return storage.read_json(uri) if storage.exists(uri) else []


def forget_after(run_uri: str, step: int) -> None:
    """Delete the metrics of steps that will be repeated."""
    for later in steps(run_uri):
        if later > step:
            storage.remove(_uri(run_uri, later))


def unsent(rows: Sequence[StepMetrics], logged: LoggedSteps, complete: int) -> list[StepMetrics]:
    """Return what MLflow lacks of some steps.

    Args:
        rows: Metrics of steps.
        logged: How far the metrics have been sent.
        complete: The last step whose late metrics are known: those that validation and checkpoints
            add to a step after it was measured.
    """
    found = []
    for row in rows:
        metrics = {
            name: value
            for name, value in row["metrics"].items()
            if (
                logged["late"] < row["step"] <= complete
                if is_late(name)
                else row["step"] > logged["step"]
            )
        }
        if metrics:
            found.append(StepMetrics(step=row["step"], time_ms=row["time_ms"], metrics=metrics))
    return found
