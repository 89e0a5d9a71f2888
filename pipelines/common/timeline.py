"""A timeline of a run, as trace events that https://ui.perfetto.dev and chrome://tracing open.

Spans are recorded in this process while a timeline is on; workers send theirs as plain dicts. The
format is the Trace Event Format of Chromium: complete events ("X") with microseconds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypedDict


class Span(TypedDict):
    """Something that took time in a process."""

    name: str
    process: str
    """The process, in words, such as `worker 0`."""
    start_s: float
    """Seconds since the epoch."""
    seconds: float


class Timeline:
    """Collects spans, and writes them when it has a file."""

    def __init__(
        self, path: str | None = None, process: str = "driver", records: bool = False
    ) -> None:
        """Begin a timeline.

        Args:
            path: local file to write; None writes nothing.
            process: the process that spans belong to.
            records: collect spans even without a file, to send them to another process.
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
        """Record what runs within."""
        started = time.time()
        try:
            yield
        finally:
            self.add(self._made(name, started, time.time() - started))

    def add(self, *spans: Span) -> None:
        """Add spans, such as those of workers."""
        if self.records:
            self._spans += spans

    def drain(self) -> list[Span]:
        """Take the spans that were collected since the last call."""
        spans, self._spans = self._spans, []
        return spans

    def write(self) -> None:
        """Write the file, with the tasks and actors that Ray recorded when it runs."""
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
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({"traceEvents": [*events, *_ray_events()]}))
        temporary.replace(path)


def _process_age_s() -> float:
    """Seconds since this process was started."""
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
    """Begin the timeline of this process; without a path nothing is recorded.

    Args:
        path: local file to write.
    """
    global _current  # noqa: PLW0603 - one per process, like the root logger
    _current = Timeline(path)
    return _current


def is_on() -> bool:
    """Whether this process records a timeline."""
    return _current.records


def span(name: str) -> AbstractContextManager[None]:
    """Record what runs within, on the timeline of this process."""
    return _current.span(name)


def add(*spans: Span) -> None:
    """Add spans of workers to the timeline of this process."""
    _current.add(*spans)
