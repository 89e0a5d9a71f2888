"""Small generated videos whose changes of shot are known exactly, at a constant or a variable rate.

A shot shows waves of one color that move to the left, so that only its first frame differs much
from the frame before.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH = 64, 96
TICK = Fraction(1, 1000)
COLORS = (
    (200, 60, 60),
    (60, 190, 60),
    (60, 60, 220),
    (230, 220, 40),
    (60, 220, 220),
    (200, 60, 200),
)


def pictures_of_shots(counts: Sequence[int]) -> list[np.ndarray]:
    """Pictures [64, 96, 3] uint8 of shots of the given numbers of frames."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    pictures = []
    for number, count in enumerate(counts):
        waves = np.sin(2 * np.pi * columns * (1 + number % 3) / WIDTH)
        waves = waves * np.cos(2 * np.pi * rows * (1 + number % 2) / HEIGHT)
        ground = (0.75 + 0.25 * waves)[..., None] * np.array(COLORS[number % len(COLORS)])
        pictures += [np.roll(ground.astype(np.uint8), -step, axis=1) for step in range(count)]
    return pictures


def constant_times(num_frames: int, fps: int = 25) -> list[Fraction]:
    """Times in seconds at which frames of a constant rate are shown."""
    return [Fraction(number, fps) for number in range(num_frames)]


def variable_times(num_frames: int) -> list[Fraction]:
    """Times in seconds at which frames are shown, 20 to 200 ms after one another."""
    steps = np.random.default_rng(1).choice([20, 40, 100, 200], num_frames - 1).tolist()
    return list(accumulate((step * TICK for step in steps), initial=Fraction(0)))


def write_shots(
    path: Path,
    counts: Sequence[int],
    times_s: Sequence[Fraction] | None = None,
    codec: str = "libx264",
    **options: str,
) -> list[float]:
    """Write a video of shots of the given numbers of frames, at 25 frames/s without `times_s`.

    Returns:
        The times in seconds at which a shot follows another.
    """
    times_s = times_s or constant_times(sum(counts))
    tick = TICK if any((time_s * 25).denominator > 1 for time_s in times_s) else Fraction(1, 25)
    with av.open(str(path), "w") as target:
        stream = target.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = options
        stream.codec_context.time_base = tick
        for picture, time_s in zip(pictures_of_shots(counts), times_s, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(time_s / tick), tick
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return [float(times_s[first]) for first in list(accumulate(counts))[:-1]]
