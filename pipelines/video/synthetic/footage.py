"""Writes footage with the detail and motion of filmed video, to measure decoding and sizes.

The scenes of `render` are flat, so they compress and decode far better than real clips do. Frames
are composed of 8-bit planes that are made once, because drawing every frame anew would take longer
than encoding it.

Legend: H and W pixels of a frame.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

OCTAVES = 9
"""Scales of the texture, each with twice as many cells as the one before."""
PERSISTENCE = 0.8
"""Amplitude of each scale, relative to the next coarser one. Filmed pictures have approximately
equal contrast at every scale; less at the finest, which lenses and compression blur."""
BRIGHTNESS, CONTRAST = 128.0, 80.0
"""Mean, and largest deviation from it, of the texture in gray levels."""
COLOR = 25.0
GRAIN = 4.0
"""Standard deviation of the noise of every frame, in gray levels. Without noise, frames after the
first would compress to almost nothing."""
GRAINS = 16
"""Number of different noise patterns."""
DRIFT_PERIOD = 240.0
"""Frames in which the camera drifts from one side to the other and back, at most."""
GOP = 250
"""Frames from one key frame to the next, the default of x264."""

Plane = npt.NDArray[np.uint8]


def _texture(
    height: int, width: int, deviation: float, generator: np.random.Generator
) -> npt.NDArray[np.float32]:
    """Return [H, W] float32 with detail at all scales, within `deviation` of zero."""
    picture = np.zeros((height, width), dtype=np.float32)
    for octave in range(1, OCTAVES + 1):
        cells = generator.uniform(-1, 1, (2**octave + 1, 2**octave + 1)).astype(np.float32)
        rows = np.linspace(0, 2**octave, height, endpoint=False)
        columns = np.linspace(0, 2**octave, width, endpoint=False)
        top, left = rows.astype(int), columns.astype(int)
        down = (rows - top)[:, None].astype(np.float32)
        right = (columns - left)[None, :].astype(np.float32)
        upper = cells[top][:, left] * (1 - right) + cells[top][:, left + 1] * right
        lower = cells[top + 1][:, left] * (1 - right) + cells[top + 1][:, left + 1] * right
        picture += (upper * (1 - down) + lower * down) * PERSISTENCE**octave
    return picture * (deviation / np.abs(picture).max())


def write_footage(
    path: Path, seconds: float, width: int, height: int, fps: float, seed: int = 0
) -> Path:
    """Write a video of a camera that drifts over a texture, with a box that moves across it.

    Args:
        path: The .mp4 file to write.
        seconds: Duration of the video.
        width: W; an even number.
        height: H; an even number.
        fps: Frames per second, rounded to thousandths.
        seed: Seed for everything that is drawn at random.

    Returns:
        `path`.
    """
    generator = np.random.default_rng(seed)
    # Twice the size of a frame, so that the camera has room.
    luma = (BRIGHTNESS + _texture(2 * height, 2 * width, CONTRAST, generator)).astype(np.uint8)
    chroma = [(128 + _texture(height, width, COLOR, generator)).astype(np.uint8) for _ in range(2)]
    # Bytes of small signed numbers: adding them to bytes that are far from 0 and 255 is exact.
    limit = 4 * GRAIN
    noise = generator.normal(0, GRAIN, (GRAINS, height, width)).clip(-limit, limit)
    grains = noise.astype(np.int8).view(np.uint8)
    phases = generator.uniform(0, 2 * np.pi, 2)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(round(fps * 1000), 1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = GOP
        stream.options = {"preset": "veryfast", "crf": "23", "sc_threshold": "0"}
        for number in range(max(1, round(seconds * fps))):
            angle = 2 * np.pi * number / DRIFT_PERIOD * np.array([0.7, 1.0]) + phases
            top, left = ((np.sin(angle) + 1) / 4 * (height, width)).astype(int).tolist()
            planes = _frame(luma, chroma, 2 * top, 2 * left, number)
            planes[0] += grains[generator.integers(GRAINS)]
            flat = np.concatenate([plane.ravel() for plane in planes])
            frame = av.VideoFrame.from_ndarray(flat.reshape(-1, width), format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _frame(luma: Plane, chroma: list[Plane], top: int, left: int, number: int) -> list[Plane]:
    """Return the three planes of a frame: [H, W] and twice [H / 2, W / 2] uint8."""
    planes = []
    for texture, divisor in ((luma, 1), (chroma[0], 2), (chroma[1], 2)):
        height, width = texture.shape[0] // 2, texture.shape[1] // 2
        y, x = top // divisor, left // divisor
        plane = texture[y : y + height, x : x + width].copy()
        # A quarter of the frame, from another part of the texture, which moves to the right.
        tall, wide = height // 4, width // 4
        right = number * 4 // divisor % (width - wide)
        below = height // 3
        plane[below : below + tall, right : right + wide] = texture[-tall:, -wide:]
        planes.append(plane)
    return planes
