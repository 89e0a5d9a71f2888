"""Small generated videos of which no two frames are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import av
import numpy as np


def moving_pictures(count: int, width: int = 96, height: int = 64, seed: int = 0) -> list:
    """Pictures [height, width, 3] uint8 of a ground that moves to the left."""
    generator = np.random.default_rng(seed)
    cells = generator.integers(0, 255, (height // 4, width // 4 + count, 3), dtype=np.uint8)
    ground = cells.repeat(4, axis=0).repeat(4, axis=1)
    return [np.ascontiguousarray(ground[:, 2 * n : 2 * n + width]) for n in range(count)]


def encode_video(
    path: Path,
    codec: str,
    pictures: Sequence[np.ndarray],
    rate: int = 25,
    container: Mapping[str, str] | None = None,
    **options: str,
) -> Path:
    """Encode pictures with the codec's options, in the container of the path's ending."""
    height, width, _ = pictures[0].shape
    with av.open(str(path), "w", options=dict(container or {})) as target:
        stream = target.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = options
        for picture in pictures:
            target.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        target.mux(stream.encode(None))
    return path
