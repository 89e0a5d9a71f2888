"""Bytes of generated videos."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.video.synthetic.render import encode_h264, render
from pipelines.video.synthetic.scenes import Scene

SCENE = Scene("red", "circle", "black", ("moves left", "grows"))


def test_a_seed_decides_the_bytes_of_a_video() -> None:
    """x264 writes its settings into the stream; those that are not reproducible are off."""
    videos = [encode_h264(render(SCENE, np.random.default_rng((0, 1)))) for _ in range(2)]

    assert videos[0] == videos[1]
    for setting in (b"mbtree=0", b"threads=1", b"lookahead_threads=1"):
        assert setting in videos[0]


@pytest.mark.parametrize(
    ("shape", "share"),
    [("circle", math.pi / 4), ("square", 1.0), ("triangle", 0.5), ("cross", 0.7 - 0.35**2)],
)
@pytest.mark.parametrize("events", [("grows", "moves right"), ("moves up", "shrinks")])
def test_a_shape_is_drawn_whole(shape: str, share: float, events: tuple[str, str]) -> None:
    """Of its bounding box, which is as wide as high, it covers the share that geometry says."""
    scene = Scene("white", shape, "black", events)
    for frame in render(scene, np.random.default_rng((0, 2)))[[0, -1]]:
        covered = (frame[..., 0].astype(float) / 255 - 0.06).clip(0) / 0.88
        rows, columns = np.nonzero(covered > 0.5)
        height, width = (np.ptp(places) + 1 for places in (rows, columns))
        assert abs(width - height) <= 2
        assert (covered > 0.5).sum() == pytest.approx(share * width * height, rel=0.12)
