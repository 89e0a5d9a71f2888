"""Elastic training in which workers always get equal shares of the global batch.

Ray Train accepts any number of workers between the minimum and the maximum. A number that does not
divide the global batch, such as three workers for 160 clips per step, would leave workers waiting
for each other forever. Ray Train has no public option to restrict the numbers, so this module
restricts its scaling policy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ReservedResources
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, ScalingPolicy

from pipelines.train.controller import run_controller, without_needless_callbacks


class EvenSharesPolicy(ElasticScalingPolicy):
    """Uses the largest allowed number of workers that fits the cluster."""

    def __init__(self, scaling_config: ScalingConfig, allowed_worker_counts: Sequence[int]) -> None:
        super().__init__(scaling_config)
        self.allowed_worker_counts = allowed_worker_counts

    def _count_possible_workers(self, reserved_resources: ReservedResources) -> int:
        room = super()._count_possible_workers(reserved_resources)
        return max((world for world in self.allowed_worker_counts if world <= room), default=0)


class EvenSharesTrainer(TorchTrainer):
    """A TorchTrainer that, in elastic mode, runs only with allowed numbers of workers.

    Ray Train's controller runs in this process, and SIGINT is left to the job, which closes the
    MLflow run, says how to resume, and exits.

    Args:
        allowed_worker_counts: Allowed numbers of workers.
        reserved: Whether the workers run in the placement group of this process.
        **settings: Arguments of TorchTrainer.
    """

    def __init__(
        self,
        *args: Any,
        allowed_worker_counts: Sequence[int],
        reserved: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.allowed_worker_counts = allowed_worker_counts
        self.reserved = reserved

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        settings["callbacks"] = without_needless_callbacks(
            settings["callbacks"], bool(self.datasets)
        )
        policy: ScalingPolicy = settings["scaling_policy"]
        if isinstance(policy, ElasticScalingPolicy):
            settings["scaling_policy"] = EvenSharesPolicy(
                policy.scaling_config, self.allowed_worker_counts
            )
        return run_controller(settings, self.reserved)
