"""Bytes of generated videos."""

from __future__ import annotations

import numpy as np

from pipelines.synthetic.render import encode_h264, render
from pipelines.synthetic.scenes import Scene

SCENE = Scene("red", "circle", "black", ("moves left", "grows"))


def test_a_seed_decides_the_bytes_of_a_video() -> None:
    """x264 writes its settings into the stream; those that are not reproducible are off."""
    videos = [encode_h264(render(SCENE, np.random.default_rng((0, 1)))) for _ in range(2)]

    assert videos[0] == videos[1]
    for setting in (b"mbtree=0", b"threads=1", b"lookahead_threads=1"):
        assert setting in videos[0]
