"""Decodes animated WebP pictures with Pillow, because FFmpeg cannot.

Pillow is loaded only when a file needs it, to keep decoder child processes small.

Legend: N frames of the animation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import av
import numpy as np
import numpy.typing as npt

from pipelines.video.exact_frames import DEFAULT_FPS, Convert, VideoIndex

if TYPE_CHECKING:
    from PIL.Image import Image

ANIMATED = 0x02
"""Flag of an animation in the header of an extended WebP file."""
MS_PER_S = 1000.0


def matches(beginning: bytes) -> bool:
    """Return whether a file is an animated WebP picture, from its first 21 bytes or more."""
    extended = beginning[:4] == b"RIFF" and beginning[8:16] == b"WEBPVP8X"
    return extended and len(beginning) > 20 and bool(beginning[20] & ANIMATED)


@contextmanager
def _opened(path: str) -> Iterator[Image]:
    from PIL import Image

    with Image.open(path, formats=["WEBP"]) as image:
        yield image


def read_index(path: str) -> VideoIndex:
    """Index the frames of an animation by their times; this decodes all of them."""
    durations_s = []
    with _opened(path) as image:
        width, height = image.size
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            image.load()
            durations_s.append(image.info.get("duration", 0) / MS_PER_S)
    total_s = sum(durations_s)
    fps = len(durations_s) / total_s if total_s > 0 else DEFAULT_FPS
    none = np.array([], dtype=np.int64)
    return VideoIndex(
        width=width,
        height=height,
        pixel_aspect=1.0,
        average_fps=fps,
        guessed_fps=fps,
        codec="webp",
        num_frames=len(durations_s),
        broken_tail=False,
        containers=frozenset({"webp"}),
        clean_cuts=False,
        starts_s=0.0,
        last_shown_s=durations_s[-1],
        pts=none,
        shown_s=np.cumsum([0.0, *durations_s[:-1]])
        if total_s > 0
        else np.arange(len(durations_s)) / fps,
        key_pts=none,
        key_positions=none,
    )


def frames_at(
    path: str, wanted: Sequence[int], convert: Convert
) -> dict[int, npt.NDArray[np.uint8]]:
    """Decode the frames with the given indices, each below N.

    Args:
        path: the file.
        wanted: frame indices.
        convert: converts a frame to an array.
    """
    taken = {}
    with _opened(path) as image:
        for number in sorted(set(wanted)):
            image.seek(number)
            taken[number] = convert(av.VideoFrame.from_image(image.convert("RGB")))
    return taken
