"""Accuracy of answers, overall and by type of question, with bootstrap intervals.

Every question counts: one whose answer is outside the vocabulary, or whose video is missing, is a
wrong answer and stays in the denominator. Resamples draw videos with all their questions, since
the questions of a video succeed and fail together.

Legend: N questions, G videos, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from stgt.question_answering.question_types import OTHER, QUESTION_TYPES
from stgt.retrieval.bootstrap import RESAMPLES, times_drawn

FloatArray = npt.NDArray[np.float64]

ACCURACY = "answers/accuracy"
"""Name of the overall accuracy; that of a type is followed by `_` and the type."""


def metric_of(question_type: str) -> str:
    """Return the name of the accuracy of a type of questions."""
    return f"{ACCURACY}_{question_type}"


def accuracy(is_right: npt.NDArray[np.bool_], types: Sequence[str]) -> dict[str, float]:
    """Compute the accuracy of all questions and of each type that occurs, in percent.

    Args:
        is_right: [N] bool, True = the predicted answer equals the annotated one.
        types: Type of each question, as `question_type` returns it.

    Returns:
        `answers/accuracy` and, for each type that occurs, such as `answers/accuracy_what`.

    Raises:
        ValueError: There are no questions, or the lengths differ.
    """
    if len(is_right) == 0 or len(is_right) != len(types):
        raise ValueError(
            f"accuracy: got {len(is_right)} answers and {len(types)} types; expected as many types "
            "as answers, and at least one"
        )
    found = {ACCURACY: 100 * float(np.mean(is_right))}
    of_type = np.asarray(types)
    for name in _present(types):
        found[metric_of(name)] = 100 * float(np.mean(is_right[of_type == name]))
    return found


def resampled_accuracy(
    is_right: npt.NDArray[np.bool_],
    types: Sequence[str],
    videos: npt.NDArray[np.int64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, FloatArray]:
    """Compute the accuracies in each bootstrap resample of the videos.

    The same seed and videos give the same resamples, so that two models can be compared in pairs.

    Args:
        is_right: [N] bool.
        types: Type of each question.
        videos: [N] int64, number of the video of each question, from 0 to G - 1.
        resamples: B.
        seed: Seed for drawing videos.

    Returns:
        [B] float64 in percent for each name that `accuracy` returns; NaN for a resample without a
        question of the type.
    """
    num_videos = int(videos.max()) + 1
    of_type = np.asarray(types)
    groups = {ACCURACY: np.ones(len(is_right), dtype=bool)}
    groups |= {metric_of(name): of_type == name for name in _present(types)}
    right, asked = (
        np.stack(
            [
                np.bincount(videos, weights=weights * chosen, minlength=num_videos)
                for chosen in groups.values()
            ],
            axis=1,
        )
        for weights in (is_right.astype(np.float64), np.ones(len(is_right)))
    )
    values = []
    for drawn in times_drawn(num_videos, resamples, seed):
        total = drawn @ asked
        values.append(100 * (drawn @ right) / np.where(total == 0, np.nan, total))
    return dict(zip(groups, np.concatenate(values).T, strict=True))


def _present(types: Sequence[str]) -> list[str]:
    there = set(types)
    return [name for name in (*QUESTION_TYPES, OTHER) if name in there]
