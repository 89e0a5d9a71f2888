"""Records a timeline of a run, for https://ui.perfetto.dev and chrome://tracing.

This process records spans while its timeline is on, and workers send theirs as plain dicts. The
format is Chromium's Trace Event Format: complete events ("X") in microseconds.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypedDict

logger = logging.getLogger(__name__)


class Span(TypedDict):
    """Work in a process, with its start and duration."""

    name: str
    process: str
    """Readable name of the process, such as `worker 0`."""
    start_s: float
    """Seconds since the epoch."""
    seconds: float


class Timeline:
    """Collects spans and writes them to a file, if it has one."""

    def __init__(
        self, path: str | None = None, process: str = "driver", records: bool = False
    ) -> None:
        """Start a timeline.

        Args:
            path: Local file to write. None writes nothing.
            process: Name of the process that spans belong to.
            records: Whether to collect spans even without a file, to send them to another process.
        """
        self.path = path
        self.records = records or path is not None
        self._process = process
        self._spans: list[Span] = []
        if self.records:
            age_s = _process_age_s()
            self.add(self._made("start the process", time.time() - age_s, age_s))

    def _made(self, name: str, start_s: float, seconds: float) -> Span:
        return {"name": name, "process": self._process, "start_s": start_s, "seconds": seconds}

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Record the enclosed code as a span."""
        started = time.time()
        try:
            yield
        finally:
            self.add(self._made(name, started, time.time() - started))

    def add(self, *spans: Span) -> None:
        """Add spans, for example those of workers."""
        if self.records:
            self._spans += spans

    def drain(self) -> list[Span]:
        """Return and clear the spans collected since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def write(self) -> None:
        """Write the file. If Ray is running, it includes Ray's tasks and actors."""
        if self.path is None:
            return
        events = [
            {
                "name": span["name"],
                "ph": "X",
                "ts": span["start_s"] * 1e6,
                "dur": span["seconds"] * 1e6,
                "pid": "job",
                "tid": span["process"],
            }
            for span in self._spans
        ]
        path = Path(self.path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"traceEvents": [*events, *_ray_events()]}))
            temporary.replace(path)
        except Exception as error:  # the result of the run counts more than its timeline
            logger.warning("the timeline could not be written to %s: %s", path, error)
            temporary.unlink(missing_ok=True)


def _process_age_s() -> float:
    """Return the seconds since this process started."""
    import psutil

    return time.time() - psutil.Process().create_time()


def _ray_events() -> Sequence[dict]:
    import sys

    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return []
    return list(ray.timeline() or [])


_current = Timeline()


def start(path: str | None) -> Timeline:
    """Start the timeline of this process.

    Args:
        path: Local file to write. None records nothing.
    """
    global _current  # noqa: PLW0603 - one per process, like the root logger
    _current = Timeline(path)
    return _current


def is_on() -> bool:
    """Return whether this process records a timeline."""
    return _current.records


def span(name: str) -> AbstractContextManager[None]:
    """Record the enclosed code as a span on the timeline of this process."""
    return _current.span(name)


def add(*spans: Span) -> None:
    """Add spans of workers to the timeline of this process."""
    _current.add(*spans)
