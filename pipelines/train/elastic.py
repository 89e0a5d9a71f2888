"""Elastic training whose workers always share a global batch evenly.

Ray Train takes any number of workers between the fewest and the most; with 160 clips a step and
three workers left, two would have to wait for each other forever. It has no public way to say which
numbers will do, so its scaling policy is narrowed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ReservedResources
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingPolicy


class EvenSharesPolicy(ElasticScalingPolicy):
    """Takes the most workers that there is room for, of the numbers that are allowed."""

    def __init__(self, scaling_config: ScalingConfig, allowed_worker_counts: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.allowed_worker_counts = allowed_worker_counts

    def _count_possible_workers(self, reserved_resources: ReservedResources) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((world for world in self.allowed_worker_counts if world <= room), default=0)


class EvenSharesTrainer(TorchTrainer):
    """A TorchTrainer that, when it is elastic, runs with allowed numbers of workers only.

    Args:
        worlds: the numbers of workers that are allowed.
        **settings: those of TorchTrainer.
    """

    def __init__(self, *args: Any, allowed_worker_counts: Sequence[int], **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.allowed_worker_counts = allowed_worker_counts

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        policy: ScalingPolicy = settings["scaling_policy"]
        if isinstance(policy, ElasticScalingPolicy):
            settings["scaling_policy"] = EvenSharesPolicy(
                policy.scaling_config, self.allowed_worker_counts
            )
        return super()._initialize_and_run_controller(**settings)
