"""Elastic training takes numbers of workers that share a global batch, and no others."""

from __future__ import annotations

import pytest
from ray.train import ScalingConfig

from pipelines.config import TrainConfig
from pipelines.elastic import EvenSharesPolicy
from stgt.config import stgt_tiny


def elastic(**changes: object) -> TrainConfig:
    values = {"data": ("s",), "output": "o", "model": stgt_tiny(), "global_batch": 160}
    return TrainConfig(**{**values, "num_workers": 8, "min_workers": 3, **changes})


def test_worlds_are_the_divisors_of_the_global_batch() -> None:
    assert elastic().worlds == (4, 5, 8)
    assert elastic().clips_per_block == 4
    assert elastic(num_workers=4, min_workers=None).worlds == (4,)
    with pytest.raises(ValueError, match=r"number of workers \(6\).*162 is"):
        elastic(num_workers=6)


def test_what_is_left_of_a_cluster_is_used_as_far_as_shares_are_even() -> None:
    config = elastic()
    policy = EvenSharesPolicy(
        ScalingConfig(num_workers=(3, 8), resources_per_worker={"CPU": 1}), config.worlds
    )
    found = [
        policy._count_possible_workers({"a": {"CPU": cpus}, "b": {"CPU": 2}})  # noqa: SLF001
        for cpus in range(8)
    ]
    assert found == [0, 0, 4, 5, 5, 5, 8, 8]


def test_epochs_are_counted_without_binary_rounding() -> None:
    assert elastic(epochs=1.1, global_batch=16).steps_for(160) == 11
    assert elastic(epochs=1.1, global_batch=16).steps_for(161) == 12
    assert elastic(steps=7).steps_for(161) == 7
