"""Timelines are trace events that Perfetto opens."""

from __future__ import annotations

import json
import time
from pathlib import Path

from pipelines.common import timeline
from pipelines.common.timeline import Timeline


def test_spans_are_complete_events_in_microseconds(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "timeline.json"
    before = time.time()
    line = timeline.start(str(path))
    try:
        with timeline.span("sleep"):
            time.sleep(0.02)
        worker = Timeline(process="training worker 1", records=True)
        with worker.span("step 1"):
            pass
        timeline.add(*worker.drain())
        assert worker.drain() == []
        line.write()
    finally:
        timeline.start(None)
    events = {event["name"]: event for event in json.loads(path.read_text())["traceEvents"]}
    assert {"start the process", "sleep", "step 1"} <= events.keys()
    assert all(event["ph"] == "X" for event in events.values())
    assert events["sleep"]["dur"] >= 20_000
    assert events["sleep"]["ts"] >= before * 1e6
    assert (events["sleep"]["tid"], events["step 1"]["tid"]) == ("driver", "training worker 1")
    assert list(path.parent.iterdir()) == [path]


def test_without_a_file_nothing_is_recorded(tmp_path: Path) -> None:
    line = timeline.start(None)
    with timeline.span("work"):
        pass
    line.write()
    assert not timeline.is_on()
    assert line.drain() == []
