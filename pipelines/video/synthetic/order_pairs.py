"""Captions of generated clips with counterparts that differ only in the order or direction.

Every clip gets the caption with its two events exchanged (kind `order`) and the captions in which
one event has the opposite direction (kind `direction`). Scenes are chosen at random, so each side
of a pair is equally often the true one, and a model that ignores time is right in half of the
pairs on average.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pyarrow as pa

from pipelines.common import storage
from pipelines.video.synthetic.dataset import Video
from pipelines.video.synthetic.scenes import OPPOSITE, Scene

ORDER, DIRECTION, REVERSAL = "order", "direction", "reversal"
SCHEMA = pa.schema([(name, pa.string()) for name in ("clip_id", "caption", "counterpart", "kind")])


def counterparts(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """Yield the scenes that differ from a scene only in the order or direction, each with its kind.

    A scene whose events would become equal is left out, because no clip shows it.
    """
    first, second = scene.events
    yield ORDER, replace(scene, events=(second, first))
    for events in ((OPPOSITE[first], second), (first, OPPOSITE[second])):
        if events[0] != events[1]:
            yield DIRECTION, replace(scene, events=events)


def write_order_pairs(uri: str, videos: Iterable[Video]) -> int:
    """Write the table of pairs of all intact videos, and return the number of pairs.

    Args:
        uri: The table (.parquet), for `order_pairs` of jobs.evaluate.
        videos: The videos; damaged ones cannot be scored and are left out.
    """
    rows = [
        _row(video, other, kind)
        for video in videos
        if video.damaged is None
        for kind, other in counterparts(video.scene)
    ]
    storage.write_table(uri, pa.Table.from_pylist(rows, schema=SCHEMA))
    return len(rows)


def write_reversal_pairs(uri: str, videos: Iterable[Video]) -> int:
    """Write pairs of each video's caption and that of the video played backwards (`reversal`).

    Args:
        uri: The table (.parquet), for `order_pairs` of jobs.evaluate.
        videos: Videos from `dataset.with_reversals`. Each is there in both directions, so a model
            that ignores the order of frames prefers the same caption for both, and is right in
            half of the pairs.

    Returns:
        The number of pairs.
    """
    rows = [_row(video, video.scene.backwards(), REVERSAL) for video in videos]
    storage.write_table(uri, pa.Table.from_pylist(rows, schema=SCHEMA))
    return len(rows)


def _row(video: Video, other: Scene, kind: str) -> dict[str, str]:
    return {
        "clip_id": video.video_id,
        "caption": video.scene.caption(),
        "counterpart": other.caption(),
        "kind": kind,
    }
