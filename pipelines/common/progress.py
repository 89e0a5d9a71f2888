"""Progress of long work, logged by the driver.

Workers send small dicts through a queue (`ray.util.queue`, an actor). A thread of the driver logs
them at a readable rate, as one stream without Ray's prefixes for workers.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from queue import Empty
from types import TracebackType
from typing import Any

from ray.exceptions import RayError
from ray.util.queue import Queue

from pipelines.common import metrics, timeline
from pipelines.common.cluster import on_driver_node

logger = logging.getLogger(__name__)

MIN_INTERVAL_S = 3.0
RECENT_LINES = 10
MIN_WINDOW_S = 1.0
POLL_S = 0.5
GAUGES_S = 5.0
"""Seconds between two records of the same gauges. Ray exports them every 10 s."""


def duration(seconds: float) -> str:
    """Format seconds as `42 s`, `3 m 05 s` or `2 h 07 m`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


class Progress:
    """Logs the progress of a stage: units done, percentage, rate, its own figures, time left."""

    def __init__(self, label: str, total: int, unit: str, done: int = 0) -> None:
        self._label = label
        self._total = total
        self._unit = unit
        self._done = done
        # The clock starts at the first message, so that the start of workers is not in the rate.
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_LINES)
        self._printed = 0.0
        self.gauges = metrics.GaugeSet()
        """Gauges for Prometheus, kept by `ProgressChannel`."""

    def advance(self, count: int, figures: Mapping[str, str] | None = None) -> None:
        """Add finished units, and log progress unless the last line is recent."""
        self.reach(self._done + count, figures)

    def reach(self, done: int, figures: Mapping[str, str] | None = None) -> None:
        """Set the number of finished units, which may decrease after a restart."""
        self._done = done
        now = time.monotonic()
        if now - self._printed < MIN_INTERVAL_S and done < self._total:
            return
        self._printed = now
        self.gauges.set(metrics.PROGRESS, done / max(1, self._total), work=self._label)
        self._recent.append((now, done))
        elapsed, made = (b - a for a, b in zip(self._recent[0], (now, done), strict=True))
        rate = max(0.0, made / elapsed) if elapsed >= MIN_WINDOW_S else 0.0
        parts = [
            f"{self._label}: {done:,} of {self._total:,} {self._unit} "
            f"({100 * done / max(1, self._total):.0f} %)"
        ]
        if rate > 0:
            parts.append(f"{rate:.1f} {self._unit}/s")
        parts += [f"{name} {value}" for name, value in (figures or {}).items()]
        if 0 < done < self._total and rate > 0:
            parts.append(f"{duration((self._total - done) / rate)} left")
        logger.info("%s", " | ".join(parts))


class PartsProgress(Progress):
    """Progress of work in parts, each of which reports its finished and bad units.

    A part that is restarted after losing its worker is not counted twice.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, bad: int = 0) -> None:
        super().__init__(label, total, unit, done)
        self._before, self._bad_before = done, bad
        self._parts: dict[int, tuple[int, int]] = {}
        self._first: tuple[float, int] | None = None
        self._last: tuple[float, int] = (0.0, done)

    def reach_part(self, part: int, done: int, bad: int) -> None:
        """Set the numbers of finished and bad units of a part."""
        self._parts[part] = (done, bad)
        all_done = self._before + sum(count for count, _ in self._parts.values())
        all_bad = self._bad_before + sum(count for _, count in self._parts.values())
        self._last = (time.monotonic(), all_done)
        self._first = self._first or self._last
        self.reach(all_done, {"bad": f"{100 * all_bad / max(1, all_done):.1f} %"})

    def rate(self) -> float | None:
        """Return units per second between the first and last message; None if there are too few."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])


class ProgressChannel:
    """A queue from workers to the driver's `Progress`. A context manager for the driver.

    Messages: {"done": int} sets the number of finished units and {"advance": int} adds to it; all
    other entries are figures, shown as text. {"say": str} logs a warning, and {"spans": list} adds
    to the timeline. A stage may handle further messages, by the name of an entry.
    """

    def __init__(
        self, progress: Progress, handlers: Mapping[str, Callable[[Any], None]] | None = None
    ) -> None:
        self._progress = progress
        self._handlers = handlers or {}
        self.queue = Queue(
            maxsize=10_000,
            actor_options={"num_cpus": 0, "scheduling_strategy": on_driver_node()},
        )
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> ProgressChannel:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stopping.set()
        self._thread.join(timeout=5)
        self.queue.shutdown(force=True)

    def _listen(self) -> None:
        recorded = time.monotonic()
        while True:
            if time.monotonic() - recorded > GAUGES_S:
                recorded = time.monotonic()
                self._progress.gauges.record_again()
            try:
                message = dict(self.queue.get(timeout=POLL_S))
            except Empty:
                if self._stopping.is_set():
                    return
                continue
            except RayError as error:
                logger.warning(
                    "cannot read the progress queue, so progress is no longer shown: %s", error
                )
                return
            if "spans" in message:
                timeline.add(*message["spans"])
                continue
            handled = self._handlers.keys() & message.keys()
            for name in handled:
                self._handlers[name](message[name])
            if handled:
                continue
            if "say" in message:
                logger.warning("%s", message["say"])
                continue
            advance, done = message.pop("advance", None), message.pop("done", None)
            if advance is not None:
                self._progress.advance(advance, message)
            elif done is not None:
                self._progress.reach(done, message)
