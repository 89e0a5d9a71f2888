"""Selection of the frames of a clip. Depends only on numpy, so that decoders load no torch."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

FrameChoice = Literal["uniform", "head_tail", "random", "middle", "random_sorted"]


def choose_frames(
    num_source: int,
    num_frames: int,
    how: FrameChoice,
    generator: np.random.Generator | None = None,
) -> npt.NDArray[np.int64]:
    """Return ascending indices of the frames to take from a clip.

    `uniform` takes frames at equal steps, starting with the first frame. `middle` takes the middle
    frame of each of num_frames equal segments, and `random` a random frame of each segment.
    `head_tail` draws half of the frames from each half of the clip, and `random_sorted` all of them
    from the whole clip. If the clip has fewer than num_frames frames, its last frame is repeated.

    Args:
        num_source: Number of frames in the clip, at least 1.
        num_frames: Number of frames to take, at least 1.
        how: Selection rule.
        generator: Random generator, required for `random`, `random_sorted` and `head_tail`.

    Raises:
        ValueError: A number is below 1, the rule is unknown, or a random rule has no generator.
    """
    if num_source < 1 or num_frames < 1:
        raise ValueError(f"cannot take {num_frames} frames from a clip of {num_source}")
    taken = min(num_source, num_frames)
    if how == "uniform":
        chosen = np.arange(0, num_source, num_source / taken).astype(np.int64)[:taken]
    elif how == "middle":
        chosen = ((np.arange(taken) + 0.5) * num_source / taken).astype(np.int64)
    elif how == "random" and generator is not None:
        edges = np.linspace(0, num_source, taken + 1).astype(np.int64)
        chosen = generator.integers(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1))
    elif how == "head_tail" and generator is not None:
        half, head = num_source // 2, taken // 2
        first = np.sort(generator.choice(half, head, replace=False)) if head else np.empty(0, int)
        second = np.sort(generator.choice(num_source - half, taken - head, replace=False)) + half
        chosen = np.concatenate([first, second]).astype(np.int64)
    elif how == "random_sorted" and generator is not None:
        chosen = np.sort(generator.choice(num_source, taken, replace=False)).astype(np.int64)
    elif how in ("random", "random_sorted", "head_tail"):
        raise ValueError(f"frame choice {how!r} requires a generator")
    else:
        raise ValueError(f"frame choice {how!r}: must be {', '.join(get_args(FrameChoice))}")
    padding = np.full(num_frames - len(chosen), num_source - 1, dtype=np.int64)
    return np.concatenate([chosen, padding])
