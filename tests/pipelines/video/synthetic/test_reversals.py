"""Clips that are played backwards, and the pairs of captions that only time can tell apart."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq

from pipelines.video.synthetic import dataset
from pipelines.video.synthetic.order_pairs import write_reversal_pairs
from pipelines.video.synthetic.scenes import Scene, all_scenes

VIDEOS = dataset.plan_videos(num_train=200, num_val=106, seed=0)["val"]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_events_are_reversed_and_exchanged() -> None:
    scene = Scene("red", "circle", "black", ("moves left", "grows"))

    assert scene.backwards().events == ("shrinks", "moves right")
    assert all(scene.backwards().backwards() == scene for scene in all_scenes())


def test_scenes_are_distinct_and_come_in_both_directions() -> None:
    found = dataset.with_reversals(VIDEOS)

    assert len(found) >= 100
    assert len({video.scene for video in found}) == len(found)
    assert len({video.video_id for video in found}) == len(found)
    for video, backwards in zip(found[::2], found[1::2], strict=True):
        assert backwards.scene == video.scene.backwards() != video.scene
        assert not video.plays_backwards
        assert backwards.plays_backwards
        assert video.damaged is None


def test_both_clips_have_the_same_frames_in_opposite_order(tmp_path: Path) -> None:
    """Apart from the losses of the codec, an average over frames cannot tell them apart."""
    pair = dataset.with_reversals(VIDEOS)[:2]
    dataset.write_videos({"id": np.arange(2)}, str(tmp_path), pair)

    one, other = (frames_of(tmp_path / v.page_dir / f"{v.video_id}.mp4") for v in pair)

    assert np.abs(one.astype(float) - other[::-1]).mean() < 2
    assert np.abs(one.astype(float).mean(axis=0) - other.mean(axis=0)).mean() < 1
    assert np.abs(one.astype(float) - other).mean() > 2


def test_who_ignores_time_is_right_in_half_of_the_pairs(tmp_path: Path) -> None:
    """Whatever caption is preferred for a set of frames, it is true of one of the two clips."""
    videos = dataset.with_reversals(VIDEOS)
    uri = str(tmp_path / "pairs.parquet")

    assert write_reversal_pairs(uri, videos) == len(videos)

    rows = pq.read_table(uri).to_pylist()
    preferred = [min(row["caption"], row["counterpart"]) for row in rows]
    right = [row["caption"] == best for row, best in zip(rows, preferred, strict=True)]
    assert sum(right) * 2 == len(rows)
    assert {row["kind"] for row in rows} == {"reversal"}
