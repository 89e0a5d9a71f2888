"""Histograms over a store's clips. Bin edges are fixed, so histograms of shards can be summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

EDGES: dict[str, tuple[float, ...]] = {
    "short_side": (0, 144, 240, 360, 480, 720, 1080, 2160, np.inf),
    "fps": (0, 10, 14, 18, 23, 24.5, 26, 29, 31, 51, 61, np.inf),
    "duration_s": (0, 1, 2, 5, 10, 15, 20, 30, 45, 60, 120, 300, np.inf),
    "caption_words": (0, 2, 4, 6, 8, 10, 13, 16, 20, 25, 30, 40, 60, np.inf),
    "captions_per_clip": (1, 2, 3, 5, 10, 20, 21, 50, np.inf),
}
"""Bin edges in ascending order. A bin includes its lower edge and excludes its upper edge."""

TITLES = {
    "short_side": "Shorter side of the source in pixels",
    "fps": "Frames per second",
    "duration_s": "Duration of the video in seconds",
    "caption_words": "Words per caption",
    "captions_per_clip": "Captions per clip",
}


def count(values: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    """Return the histogram of the values of each name."""
    return {
        name: np.histogram(np.asarray(values[name], dtype=float), bins=edges)[0].tolist()
        for name, edges in EDGES.items()
    }


def add(parts: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """Return the sum of histograms."""
    return {
        name: [sum(counts) for counts in zip(*(part[name] for part in parts), strict=True)]
        for name in EDGES
    }


def labelled(name: str, counts: Sequence[int]) -> dict[str, int]:
    """Return counts by label, without the empty bins at both ends."""
    edges = EDGES[name]
    names = [
        f"{low:g} and more" if high == np.inf else f"{low:g} to {high:g}"
        for low, high in zip(edges[:-1], edges[1:], strict=True)
    ]
    filled = np.flatnonzero(counts)
    shown = slice(filled[0], filled[-1] + 1) if len(filled) else slice(0, 0)
    return dict(zip(names[shown], counts[shown], strict=True))
