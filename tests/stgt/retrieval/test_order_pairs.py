"""Order-pair accuracy against counting by hand and by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from stgt.retrieval.order_pairs import order_accuracy, order_success, resampled_order_accuracy


def test_ties_count_half_and_missing_videos_not_at_all() -> None:
    right = np.array([0.5, 0.2, 0.3, -np.inf])
    wrong = np.array([0.4, 0.9, 0.3, -np.inf])
    success = order_success(right, wrong)
    assert success.tolist() == [1, 0, 0.5, 0]
    found = order_accuracy(success, ["order", "order", "direction", "direction"])
    assert found == {
        "order/accuracy": 37.5,
        "order/accuracy_order": 50.0,
        "order/accuracy_direction": 25.0,
    }


def test_a_model_that_scores_both_captions_alike_is_at_chance() -> None:
    same = np.random.default_rng(0).normal(size=50)
    assert order_accuracy(order_success(same, same), ["order"] * 50)["order/accuracy"] == 50


def test_resamples_are_those_of_videos_drawn_by_hand() -> None:
    generator = np.random.default_rng(1)
    clip_ids = [f"clip{n}" for n in generator.integers(0, 9, size=40)]
    kinds = generator.choice(["order", "direction"], size=40).tolist()
    success = generator.choice([0, 0.5, 1], size=40)
    found = resampled_order_accuracy(success, kinds, clip_ids, resamples=60, seed=3)
    names = list(dict.fromkeys(clip_ids))
    same = np.random.default_rng(3)
    for number in range(60):
        drawn = [names[video] for video in same.integers(len(names), size=len(names))]
        pairs = [p for video in drawn for p in range(40) if clip_ids[p] == video]
        for kind in ("order", "direction", None):
            values = [success[p] for p in pairs if kind in (None, kinds[p])]
            name = "order/accuracy" if kind is None else f"order/accuracy_{kind}"
            expected = 100 * np.mean(values) if values else np.nan
            assert found[name][number] == pytest.approx(expected, nan_ok=True)


def test_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="got 0 results"):
        order_accuracy(np.empty(0), [])
