"""Videos for benchmarks: moving textures in 596x336 H.264, the format of WebVid."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT, FPS = 596, 336, 24
GRAIN = 5.0
"""Standard deviation of the noise added to every frame, in gray levels. Without noise, all frames
after the first would compress to almost nothing."""


def _texture(generator: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return an image [2H, 2W, 3] float32 with detail at all scales, around 0 to 255."""
    height, width = 2 * HEIGHT, 2 * WIDTH
    picture = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(2, 8):
        cells = generator.uniform(-1, 1, (2**octave + 1, 2**octave + 1, 3)).astype(np.float32)
        rows = np.linspace(0, 2**octave, height, endpoint=False)
        columns = np.linspace(0, 2**octave, width, endpoint=False)
        top, left = rows.astype(int), columns.astype(int)
        down = (rows - top)[:, None, None].astype(np.float32)
        right = (columns - left)[None, :, None].astype(np.float32)
        upper = cells[top][:, left] * (1 - right) + cells[top][:, left + 1] * right
        lower = cells[top + 1][:, left] * (1 - right) + cells[top + 1][:, left + 1] * right
        picture += (upper * (1 - down) + lower * down) / octave
    return 127.5 + 70 * picture


def make_video(path: Path, seconds: float, gop: int, seed: int) -> Path:
    """Write a video of a camera that drifts over a texture, with boxes that move across it.

    Args:
        path: The .mp4 file to write.
        seconds: Duration of the video.
        gop: Number of frames from one key frame to the next.
        seed: Seed for the texture and all motion.
    """
    generator = np.random.default_rng(seed)
    texture, box = _texture(generator), _texture(generator)[:90, :120]
    speed = generator.uniform(0.4, 1.2, 2)
    paths = generator.uniform(20, 110, (3, 2))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.thread_count = 1
        stream.options = {"preset": "medium", "crf": "23", "sc_threshold": "0"}
        for number in range(round(seconds * FPS)):
            top, left = (
                ((np.sin(number * speed / 90) + 1) / 2 * (HEIGHT, WIDTH)).astype(int).tolist()
            )
            frame = texture[top : top + HEIGHT, left : left + WIDTH].copy()
            for down, right in paths:
                y = int(down + number) % (HEIGHT - 90)
                x = int(2 * right + 2 * number) % (WIDTH - 120)
                frame[y : y + 90, x : x + 120] = box
            frame += generator.normal(0, GRAIN, (HEIGHT, WIDTH, 1))
            image = np.clip(frame, 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def make_videos(folder: Path, count: int, seconds: float, gop: int) -> list[Path]:
    """Write several videos with `make_video` and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [make_video(folder / f"{i:02d}.mp4", seconds, gop, seed=i) for i in range(count)]
