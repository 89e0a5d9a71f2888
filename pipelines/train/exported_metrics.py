"""Metrics of a training for Prometheus, recorded by the driver."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.common import metrics
from pipelines.common.tracking import StepMetrics
from pipelines.train.config import TrainConfig

LOSS = "loss/"


class ExportedMetrics:
    """Records what the training workers send. Its methods are called with their messages."""

    def __init__(self, config: TrainConfig, gauges: metrics.GaugeSet) -> None:
        self._gauges = gauges
        self._run = config.name
        self._clips = config.global_batch
        self._validation = f"{config.validation_split}/"
        self._num_starts = 0
        self._gauges.set(metrics.TRAIN_RESTARTS, 0, run=self._run)

    def add(self, rows: Sequence[StepMetrics]) -> None:
        """Record the metrics of steps that were just done, or validation metrics of such a step."""
        for row in rows:
            found = row["metrics"]
            if "time/step_s" in found:
                self._gauges.set(metrics.TRAIN_STEP, row["step"], run=self._run)
                metrics.TRAIN_STEPS.add(1, run=self._run)
                metrics.TRAIN_CLIPS.add(self._clips, run=self._run)
                metrics.TRAIN_STEP_SECONDS.add(found["time/step_s"], run=self._run)
                self._gauges.set(metrics.TRAIN_LEARNING_RATE, found["lr"], run=self._run)
            for name, value in found.items():
                if name.startswith(LOSS):
                    loss = name.removeprefix(LOSS)
                    self._gauges.set(metrics.TRAIN_LOSS, value, run=self._run, loss=loss)
                elif name.startswith(self._validation):
                    self._gauges.set(metrics.TRAIN_VALIDATION, value, run=self._run, metric=name)

    def waited(self, seconds: float) -> None:
        """Record how long a step waited for its clips."""
        metrics.TRAIN_WAIT_SECONDS.add(seconds, run=self._run)

    def begun(self, rank: int) -> None:
        """Note that a training worker has begun; rank 0 begins with each start of the group."""
        if rank == 0:
            self._num_starts += 1
            self._gauges.set(metrics.TRAIN_RESTARTS, self._num_starts - 1, run=self._run)
