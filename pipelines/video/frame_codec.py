"""Encodes and decodes stored frames.

Imports only numpy and simplejpeg, to keep decoder child processes small.

Legend: F frames, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

Codec = Literal["jpeg", "raw"]


def encode_frames(frames: npt.NDArray[np.uint8], codec: Codec, jpeg_quality: int) -> list[bytes]:
    """Encode [F, H, W, 3] uint8 frames as F images; equal frames give equal bytes."""
    if codec == "raw":
        return [frame.tobytes() for frame in frames]
    return [
        simplejpeg.encode_jpeg(
            np.ascontiguousarray(frame), quality=jpeg_quality, colorsubsampling="444"
        )
        for frame in frames
    ]


def decode_frames(coded: Sequence[bytes], codec: Codec, size: int) -> npt.NDArray[np.uint8]:
    """Decode F encoded images of size x size pixels to [F, size, size, 3] uint8.

    Raises:
        ValueError: An image is damaged or has another size.
    """
    frames = np.empty((len(coded), size, size, 3), dtype=np.uint8)
    for place, image in enumerate(coded):
        if codec == "raw":
            frames[place] = np.frombuffer(image, dtype=np.uint8).reshape(size, size, 3)
        else:
            frames[place] = simplejpeg.decode_jpeg(image)
    return frames
