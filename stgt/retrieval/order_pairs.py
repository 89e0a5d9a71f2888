"""Order-pair accuracy: how often a model prefers the caption with the true order of events.

The other caption of a pair differs from it only in the order or the direction of an event. A model
that ignores the order of frames cannot tell them apart, and reaches 50 % if each caption is the
true one equally often. Equal scores count as half a success, which is what guessing would give.

Legend: P pairs of captions, G videos, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stgt.retrieval.bootstrap import RESAMPLES, times_drawn

FloatArray = npt.NDArray[np.float64]

ORDER_ACCURACY = "order/accuracy"
"""Name of the accuracy over all pairs; that of a kind is followed by `_` and the kind."""
MISSING = -np.inf
"""Score of both captions of a video that cannot be used: such a pair counts as a failure."""


def order_success(right: npt.NDArray[np.floating], wrong: npt.NDArray[np.floating]) -> FloatArray:
    """Return [P] float64: 1 if the true caption scores higher, 0.5 if both score alike, else 0.

    Args:
        right: [P] float, score of each video with its own caption.
        wrong: [P] float, score with the counterpart. Pairs with `MISSING` scores get 0.
    """
    success = (right > wrong) + 0.5 * (right == wrong)
    return np.where(np.isneginf(right), 0.0, success)


def order_accuracy(success: FloatArray, kinds: Sequence[str]) -> dict[str, float]:
    """Compute the accuracy over all pairs and over those of each kind, in percent.

    Args:
        success: [P] float64, from `order_success`.
        kinds: Kind of each pair, such as `order` or `direction`.

    Returns:
        `order/accuracy` and, for each kind, such as `order/accuracy_direction`.

    Raises:
        ValueError: There are no pairs, or the lengths differ.
    """
    if len(success) == 0 or len(success) != len(kinds):
        raise ValueError(
            f"order pairs: got {len(success)} results for {len(kinds)} kinds; expected equally "
            "many, and at least one"
        )
    return {name: 100 * float(success[chosen].mean()) for name, chosen in _by_name(kinds).items()}


def resampled_order_accuracy(
    success: FloatArray,
    kinds: Sequence[str],
    clip_ids: Sequence[str],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """Compute the accuracies in each bootstrap resample of the videos.

    All pairs of a video are drawn together. The same seed and videos give the same resamples, so
    that two models can be compared in pairs.

    Args:
        success: [P] float64, from `order_success`.
        kinds: Kind of each pair.
        clip_ids: Id of each pair's video.
        resamples: B.
        seed: Seed for drawing videos.

    Returns:
        [B] float64 in percent for each name that `order_accuracy` returns; NaN for a resample
        without a pair of the kind.
    """
    number = {clip_id: place for place, clip_id in enumerate(dict.fromkeys(clip_ids))}
    videos = np.array([number[clip_id] for clip_id in clip_ids])
    names = _by_name(kinds)
    reached, counted = (
        np.stack(
            [
                np.bincount(videos, weights=values * chosen, minlength=len(number))
                for chosen in names.values()
            ],
            axis=1,
        )
        for values in (success, np.ones(len(success)))
    )
    found = []
    for drawn in times_drawn(len(number), resamples, seed):
        total = drawn @ counted
        found.append(100 * (drawn @ reached) / np.where(total == 0, np.nan, total))
    return dict(zip(names, np.concatenate(found).T, strict=True))


def _by_name(kinds: Sequence[str]) -> dict[str, npt.NDArray[np.bool_]]:
    """Return which pairs, [P] bool, enter each accuracy."""
    of_pair = np.asarray(kinds, dtype=object)
    every = {ORDER_ACCURACY: np.ones(len(kinds), dtype=bool)}
    return every | {f"{ORDER_ACCURACY}_{kind}": of_pair == kind for kind in sorted(set(kinds))}
