"""A 64-bit perceptual hash of a frame: similar pictures have hashes that differ in few bits.

Each bit says whether one of the 64 lowest frequencies of the frame's discrete cosine transform lies
above their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash
functions", section 3.2). The constant part is left out, so brightness does not matter. Another
size, JPEG quality or decoder changes only a few bits; a crop or a mirrored frame changes many.

Imports only numpy, to keep decoder child processes small.

Legend: F frames, H and W pixels, K = 11 frequencies per axis.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

BITS = 64
ROWS = 56
"""Approximate number of rows that are used; more would add time only, as frequencies are low."""
GREEN = 1
"""The channel that is used: it holds most of the brightness."""
LEAST_CONTRAST = 0.5
"""Root mean square of the 64 frequencies, in levels of 0 to 255, below which a frame shows
nothing."""
NO_HASH = 0
"""Hash of a frame that shows nothing, such as a black one: it is not evidence of anything."""

_LOWEST = sorted((u + v, u, v) for u in range(12) for v in range(12) if 0 < u + v < 12)[:BITS]
_U = np.array([u for _, u, _ in _LOWEST])
_V = np.array([v for _, _, v in _LOWEST])
_POWERS = np.left_shift(np.uint64(1), np.arange(BITS, dtype=np.uint64))


@functools.lru_cache(maxsize=8)
def _cosines(edge: int) -> npt.NDArray[np.float32]:
    """Return [K, edge] float32: the lowest basis functions of the DCT-II, divided by `edge`."""
    frequencies = np.arange(max(_U.max(), _V.max()) + 1)[:, None]
    angles = np.pi * frequencies * (2 * np.arange(edge)[None, :] + 1) / (2 * edge)
    return (np.cos(angles) * np.where(frequencies == 0, 1.0, np.sqrt(2.0)) / edge).astype(
        np.float32
    )


def hash_frames(frames: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return the hashes [F] uint64 of frames [F, H, W, 3] uint8; `NO_HASH` if one shows nothing."""
    step = max(1, frames.shape[1] // ROWS)
    green = frames[:, step // 2 :: step, :, GREEN].astype(np.float32)
    spectrum = _cosines(green.shape[1]) @ (green @ _cosines(green.shape[2]).T)
    lowest = spectrum[:, _U, _V]
    above = lowest > np.median(lowest, axis=1, keepdims=True)
    hashes = (above * _POWERS).sum(axis=1, dtype=np.uint64)
    shows_nothing = np.sqrt(np.mean(lowest**2, axis=1)) < LEAST_CONTRAST
    return np.where(shows_nothing, np.uint64(NO_HASH), hashes)
