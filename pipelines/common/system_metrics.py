"""Measures CPU, memory, disk, network and GPUs of this machine while a run is in progress.

One of the modules that import mlflow, whose monitors do the measuring. Unlike MLflow's own thread,
which ends at the first error of the server, this one keeps what could not be sent.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipelines.common.config import TrackingConfig
from stgt.errors import SettingError

if TYPE_CHECKING:
    from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor

logger = logging.getLogger(__name__)

SWITCH = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
INTERVAL = "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"
DEFAULT_EVERY_S = 30.0
SAMPLES_PER_ROW = 6
SHORTEST_SAMPLE_S = 0.05
MOST_ROWS = 20_000
"""Rows that are kept while MLflow cannot be used: a week at the default interval."""
ATTEMPT_EVERY = 4
"""While MLflow cannot be used, only each n-th row is a reason to try again."""


def interval_s(config: TrackingConfig) -> float | None:
    """Return the seconds between system metrics; None if they are turned off.

    Raises:
        SettingError: The environment variable for the interval is not a positive number.
    """
    if config.system_metrics_every_s is not None:
        return config.system_metrics_every_s or None
    if os.environ.get(SWITCH, "true").strip().lower() in ("false", "0"):
        return None
    given = os.environ.get(INTERVAL)
    if not given:
        return DEFAULT_EVERY_S
    try:
        every_s = float(given)
    except ValueError:
        every_s = 0.0
    if every_s <= 0:
        raise SettingError(f"{INTERVAL} = {given!r}: must be a positive number of seconds")
    return every_s


class SystemMetrics:
    """Rows of system metrics, which a thread adds to until it is stopped."""

    def __init__(self, every_s: float | None, on_row: Callable[[], object]) -> None:
        """Prepare to measure.

        Args:
            every_s: Seconds that a row is the mean of; None measures nothing.
            on_row: Called in the thread when a row was added.
        """
        self._every_s = every_s
        self._on_row = on_row
        self._rows: deque[dict[str, Any]] = deque(maxlen=MOST_ROWS)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start to measure, unless system metrics are turned off."""
        if self._every_s is not None and self._thread is None:
            self._stopping.clear()
            self._thread = threading.Thread(target=self._work, name="system metrics", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Stop to measure; what was measured since the last row becomes a row."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)  # it may be waiting for MLflow
            self._thread = None

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that were not sent: their time in ms, and their metrics by name."""
        with self._lock:
            return list(self._rows)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows of an earlier start, unless they were added before."""
        with self._lock:
            known = {row["time_ms"] for row in self._rows}
            new = [row for row in rows if row["time_ms"] not in known]
            self._rows = deque([*new, *self._rows], maxlen=MOST_ROWS)

    def forget(self, rows: Sequence[dict[str, Any]]) -> None:
        """Remove rows that were sent."""
        sent = {row["time_ms"] for row in rows}
        with self._lock:
            left = [row for row in self._rows if row["time_ms"] not in sent]
            self._rows = deque(left, maxlen=MOST_ROWS)

    def _work(self) -> None:
        assert self._every_s is not None
        monitors = _monitors()
        for monitor in monitors:  # CPU utilization is measured from one call to the next
            monitor.collect_metrics()
            monitor.clear_metrics()
        pause_s = max(self._every_s / SAMPLES_PER_ROW, SHORTEST_SAMPLE_S)
        samples = 0
        while not self._stopping.wait(pause_s):
            for monitor in monitors:
                monitor.collect_metrics()
            samples += 1
            if samples * pause_s >= self._every_s:
                self._add_row(monitors)
                samples = 0
                self._on_row()
        if samples:
            self._add_row(monitors)

    def _add_row(self, monitors: Sequence[BaseMetricsMonitor]) -> None:
        metrics: dict[str, float] = {}
        for monitor in monitors:
            means: dict[str, float] = monitor.aggregate_metrics()  # type: ignore[assignment]
            metrics.update({f"system/{name}": float(mean) for name, mean in means.items()})
            monitor.clear_metrics()
        with self._lock:
            self._rows.append({"time_ms": int(time.time() * 1000), "metrics": metrics})


def _monitors() -> list[BaseMetricsMonitor]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[BaseMetricsMonitor] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:
        logger.debug("GPUs are not measured: %s", error)
    return monitors
