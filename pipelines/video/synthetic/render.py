"""Draws the frames of a scene and encodes them as a video."""

from __future__ import annotations

import io

import av
import numpy as np
import numpy.typing as npt

from pipelines.video.synthetic.scenes import (
    BACKGROUNDS,
    COLOURS,
    FPS,
    MOVES,
    NUM_FRAMES,
    RADIUS,
    SCALES,
    SIZE,
    STRIDE,
    Scene,
)


def _shape_mask(
    shape: str, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], radius: float
) -> npt.NDArray[np.float64]:
    """Return the coverage in [0, 1] of a shape around the origin, with a soft edge of one pixel."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.85 * radius
    elif shape == "triangle":
        # The triangle points up: the inside is below the two slanted edges and above the base.
        distance = np.maximum(0.894 * np.abs(x) - 0.447 * y - 0.447 * radius, y - 0.8 * radius)
    else:
        arm = 0.35 * radius
        upright = np.maximum(np.abs(x) - arm, np.abs(y) - radius)
        lying = np.maximum(np.abs(y) - arm, np.abs(x) - radius)
        distance = np.minimum(upright, lying)
    return np.clip(0.5 - distance * SIZE, 0.0, 1.0)


def render(scene: Scene, generator: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a scene.

    Args:
        scene: what to draw.
        generator: varies start, size, speed, shade and noise between clips.

    Returns:
        [NUM_FRAMES, SIZE, SIZE, 3] uint8.
    """
    stride = STRIDE * generator.uniform(0.85, 1.1)
    radius = RADIUS * generator.uniform(0.85, 1.15)
    # Start so that the shape stays in the frame at every turning point of its path.
    steps = [np.array(MOVES.get(event, (0.0, 0.0))) * stride for event in scene.events]
    path = np.cumsum([np.zeros(2), *steps], axis=0)
    margin = radius * max(1.0, *(SCALES.get(event, 1.0) for event in scene.events))
    extent = path.max(axis=0) - path.min(axis=0)
    margin = np.minimum(margin, (1 - extent) / 2)  # a large shape on a long path touches the edge
    start = generator.uniform(margin - path.min(axis=0), 1 - margin - path.max(axis=0) + 1e-9)
    background = np.array(BACKGROUNDS[scene.background]) + generator.uniform(-12, 12)
    colour = np.array(COLOURS[scene.colour]) + generator.uniform(-15, 15, size=3)

    texture = generator.normal(0, 3, size=(SIZE, SIZE, 1))
    axis = (np.arange(SIZE) + 0.5) / SIZE
    empty = np.clip(background + texture, 0, 255).astype(np.uint8)
    frames = np.repeat(empty[None], NUM_FRAMES, axis=0)
    for index in range(NUM_FRAMES):
        # The first event lasts from 0 to 1 and the second from 1 to 2.
        progress = 2.0 * index / (NUM_FRAMES - 1)
        center, scale = start.copy(), 1.0
        for order, event in enumerate(scene.events):
            done = np.clip(progress - order, 0.0, 1.0)
            if event in MOVES:
                center += np.array(MOVES[event]) * stride * done
            else:
                scale *= SCALES[event] ** done
        # Draw only the rows and columns near the shape; nothing else differs from the background.
        reach = 1.2 * radius * scale + 2 / SIZE
        columns, rows = (slice(*np.searchsorted(axis, (c - reach, c + reach))) for c in center)
        grid_x, grid_y = np.meshgrid(axis[columns], axis[rows])
        mask = _shape_mask(scene.shape, grid_x - center[0], grid_y - center[1], radius * scale)
        image = background + mask[..., None] * (colour - background)
        frames[index, rows, columns] = np.clip(image + texture[rows, columns], 0, 255)
    return frames


def encode_h264(frames: npt.NDArray[np.uint8], fps: int = FPS) -> bytes:
    """Encode [T, H, W, 3] uint8 frames as an H.264 mp4 file."""
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "preset": "veryfast", "crf": "24", "threads": "1",
            # With macroblock-tree rate control, one in 400 of these small videos has other bytes
            # when it is encoded again (PyAV 18.1), and a seed no longer says what is generated.
            "x264-params": "mbtree=0",
        }  # fmt: skip
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def damage(video: bytes, index: int) -> bytes:
    """Damage a file in a way found in real datasets: empty, an error page, or truncated."""
    kind = index % 3
    if kind == 0:
        return b""
    if kind == 1:
        return b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>"
    return video[: len(video) // 3]
