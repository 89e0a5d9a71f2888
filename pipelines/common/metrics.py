"""Metrics of running jobs for Prometheus. No other module uses `ray.util.metrics`.

Drivers record them, since all figures arrive there anyway, at the rate at which progress is
reported. Ray sends them to the agent of the driver's node every 10 s and adds the prefix `ray_` to
their names. A process that is not connected to Ray records nothing.

Labels are names of runs and of few other things, so that the number of time series stays small.
Counters are exported as long as the node lives. Ray exports a value of a gauge only once, and drops
it some 20 s later, so `GaugeSet` records the latest values again and again while the work goes on.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import ray
from ray.util import metrics as ray_metrics

PREFIX = "ray_"
"""What Ray puts before each name."""


class Counter:
    """A sum that only grows, such as the number of clips that were trained on."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        self.name = name
        self.description = description
        self.labels = labels

    @functools.cached_property
    def _of_ray(self) -> ray_metrics.Counter:
        return ray_metrics.Counter(self.name, self.description, self.labels)

    def add(self, amount: float, **labels: str) -> None:
        """Add an amount, which may be 0, to the series with these labels."""
        if amount and ray.is_initialized():
            self._of_ray.inc(float(amount), labels)


class Gauge:
    """A value that is replaced by the next one, such as the loss."""

    def __init__(self, name: str, description: str, labels: tuple[str, ...]) -> None:
        self.name = name
        self.description = description
        self.labels = labels

    @functools.cached_property
    def _of_ray(self) -> ray_metrics.Gauge:
        return ray_metrics.Gauge(self.name, self.description, self.labels)

    def record(self, value: float, labels: Mapping[str, str]) -> None:
        """Record the value of the series with these labels, for some 20 s."""
        if ray.is_initialized():
            self._of_ray.set(float(value), dict(labels))


class GaugeSet:
    """The latest values of the gauges of some work."""

    def __init__(self) -> None:
        self._values: dict[tuple[Gauge, tuple[tuple[str, str], ...]], float] = {}

    def set(self, gauge: Gauge, value: float, **labels: str) -> None:
        """Set the value of the series with these labels."""
        self._values[gauge, tuple(labels.items())] = value
        gauge.record(value, labels)

    def record_again(self) -> None:
        """Record all values again, so that Ray does not drop them."""
        for (gauge, labels), value in list(self._values.items()):
            gauge.record(value, dict(labels))


PROGRESS = Gauge(
    "stgt_progress_ratio",
    "Share of a stage's work that is done, between 0 and 1.",
    ("work",),
)

INGEST_CLIPS = Counter(
    "stgt_ingest_clips_total",
    "Clips that ingest workers have stored, taken over from a finished shard, or put into "
    "quarantine.",
    ("run", "work"),
)
INGEST_QUARANTINED = Counter(
    "stgt_ingest_quarantined_clips_total",
    "Clips that ingest workers have put into quarantine, by reason.",
    ("run", "work", "reason"),
)
INGEST_STORE_BYTES = Counter(
    "stgt_ingest_store_bytes_total",
    "Bytes of finished shards that ingest workers have written to the clip store.",
    ("run", "work"),
)
# Restarts are gauges: Ray's counters cannot be created with the value 0, and Prometheus takes the
# first value of a counter for its beginning, so that it would miss the first restart.
INGEST_RESTARTS = Gauge(
    "stgt_ingest_worker_restarts",
    "Ingest workers that were started again after they were lost, since the job was started.",
    ("run", "work"),
)

TRAIN_STEPS = Counter(
    "stgt_train_steps_total",
    "Training steps done, including those repeated after a restart of the workers.",
    ("run",),
)
TRAIN_CLIPS = Counter(
    "stgt_train_clips_total",
    "Clips that the training steps used, including those of repeated steps.",
    ("run",),
)
TRAIN_STEP_SECONDS = Counter(
    "stgt_train_step_seconds_total",
    "Seconds that the training steps took, including the wait for their clips. The wait of the "
    "first step after a start of the workers is left out.",
    ("run",),
)
TRAIN_WAIT_SECONDS = Counter(
    "stgt_train_data_wait_seconds_total",
    "Seconds of the training steps that rank 0 spent waiting for clips.",
    ("run",),
)
TRAIN_LOSS = Gauge(
    "stgt_train_loss",
    "Losses of the latest training step, by name; `total` is the one that is minimized.",
    ("run", "loss"),
)
TRAIN_LEARNING_RATE = Gauge(
    "stgt_train_learning_rate",
    "Learning rate of the latest training step.",
    ("run",),
)
TRAIN_STEP = Gauge(
    "stgt_train_step",
    "Number of the latest training step.",
    ("run",),
)
TRAIN_VALIDATION = Gauge(
    "stgt_train_validation",
    "Latest validation metrics, with their names in MLflow, such as `val/t2v/R1` in percent.",
    ("run", "metric"),
)
TRAIN_RESTARTS = Gauge(
    "stgt_train_worker_restarts",
    "Times that the training workers were started again, after a loss, an error or a change of "
    "their number, since the job was started.",
    ("run",),
)

EXPORTED: tuple[Counter | Gauge, ...] = (
    PROGRESS,
    INGEST_CLIPS,
    INGEST_QUARANTINED,
    INGEST_STORE_BYTES,
    INGEST_RESTARTS,
    TRAIN_STEPS,
    TRAIN_CLIPS,
    TRAIN_STEP_SECONDS,
    TRAIN_WAIT_SECONDS,
    TRAIN_LOSS,
    TRAIN_LEARNING_RATE,
    TRAIN_STEP,
    TRAIN_VALIDATION,
    TRAIN_RESTARTS,
)
"""All metrics of this project."""
