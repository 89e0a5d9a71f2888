"""Sends the metrics of a training to MLflow in a thread of the driver, which training never awaits.

Metrics are sent at intervals and at checkpoints. The run in MLflow stores how far they were sent,
so every step is recorded once, even if it is repeated after a crash. Rows of steps up to the last
checkpoint are read from the run's folder, and the driver's memory holds those of later steps.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType

from pipelines.common.recording import CLOSING_S, Recording
from pipelines.common.tracking import LoggedSteps, Run, StepMetrics, is_late
from pipelines.train import metrics_log
from stgt.errors import STGTError

logger = logging.getLogger(__name__)

ROWS_PER_REQUEST = 1000


class MetricsSender:
    """Collects metrics from the workers and sends them. A context manager for the driver."""

    def __init__(
        self, output: str, recording: Recording, every_s: float, checkpoint: int = 0
    ) -> None:
        """Prepare the sender; nothing is sent yet.

        Args:
            output: Folder of the run.
            recording: The MLflow run.
            every_s: Seconds between sending.
            checkpoint: Step of the latest complete checkpoint.
        """
        self._output = output
        self._recording = recording
        self._every_s = every_s
        self._checkpoint = checkpoint
        self._rows: dict[int, StepMetrics] = {}
        self._lock = threading.Lock()
        self._logged: tuple[str, LoggedSteps] | None = None
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="send metrics", daemon=True)

    def __enter__(self) -> MetricsSender:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Send the rest; wait for MLflow only for a limited time."""
        self._stopping.set()
        self._wake.set()
        self._thread.join(timeout=CLOSING_S)

    def add(self, rows: Sequence[StepMetrics]) -> None:
        """Take the metrics of steps that were just done, or further metrics of such a step."""
        with self._lock:
            for row in rows:
                step = row["step"]
                # A message with late metrics only adds to the step that it belongs to.
                known = self._rows.get(step)
                if known is None or known["time_ms"] != row["time_ms"]:
                    # If the message that it adds to was lost, the next checkpoint has both.
                    if not all(map(is_late, row["metrics"])):
                        self._rows[step] = row
                else:
                    metrics = {**known["metrics"], **row["metrics"]}
                    self._rows[step] = StepMetrics(
                        step=step, time_ms=row["time_ms"], metrics=metrics
                    )

    def checkpoint(self, step: int) -> None:
        """Note that the checkpoint of a step is complete, and send its metrics soon."""
        with self._lock:
            self._checkpoint = max(step, self._checkpoint)
            self._rows = {one: row for one, row in self._rows.items() if one > step}
        self._wake.set()

    def _work(self) -> None:
        is_last = False
        while True:
            try:
                self._recording.attempt(self.send_to)
            except (STGTError, OSError) as error:
                logger.warning("metrics could not be read, so they are not sent yet: %s", error)
            if is_last:
                return
            self._wake.wait(timeout=self._every_s)
            self._wake.clear()
            is_last = self._stopping.is_set()

    def send_to(self, run: Run) -> None:
        """Send what MLflow lacks now."""
        if self._logged is None or self._logged[0] != run.run_id:
            self._logged = (run.run_id, run.logged_steps())
        logged = self._logged[1]
        with self._lock:
            checkpoint = self._checkpoint
            rows = [row for _, row in sorted(self._rows.items())]
        for step in metrics_log.steps(self._output):
            if min(logged["step"], logged["late"]) < step <= checkpoint:
                kept = metrics_log.read(self._output, step)
                logged = self._send_rows(run, kept, logged, complete=step)
        rows = _without_gaps(rows, max(checkpoint, logged["step"]))
        if rows:
            # Validation may still add to the latest step.
            newest = rows[-1]["step"]
            for start in range(0, len(rows), ROWS_PER_REQUEST):
                part = rows[start : start + ROWS_PER_REQUEST]
                complete = min(part[-1]["step"], newest - 1)
                logged = self._send_rows(run, part, logged, complete)

    def _send_rows(
        self, run: Run, rows: Sequence[StepMetrics], logged: LoggedSteps, complete: int
    ) -> LoggedSteps:
        reached = LoggedSteps(
            step=max(logged["step"], rows[-1]["step"]), late=max(logged["late"], complete)
        )
        if reached != logged:
            run.log_steps(metrics_log.unsent(rows, logged, complete), reached)
            self._logged = (run.run_id, reached)
        return reached


def _without_gaps(rows: Sequence[StepMetrics], known: int) -> list[StepMetrics]:
    """Return the rows before the first missing step after a known one.

    A message that was lost leaves a gap, which the next checkpoint fills.
    """
    found = []
    for row in rows:
        if row["step"] > known + 1:
            break
        known = max(known, row["step"])
        found.append(row)
    return found
