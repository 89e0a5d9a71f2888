"""Runs the workers of a training in a placement group that is reserved already.

A trial of a sweep starts once Ray Tune has reserved all of its resources: a bundle for each
training worker, then one for each data worker. Ray Train would request a placement group of its own
beside it, and the trials of a sweep would wait for each other's resources. It has no public option
to use an existing group, so `controller` replaces where its worker group gets one from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
)
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

if TYPE_CHECKING:
    from pipelines.train.config import TrainConfig


def bundles(config: TrainConfig) -> list[dict[str, float]]:
    """Return the resources of a training: a bundle per training worker, then one per data worker.

    Data workers have bundles of their own, so that each of them may be on any node.
    """
    gpus = {"GPU": 1.0} if config.use_gpu else {}
    worker = {"CPU": float(config.threads_per_worker), **gpus}
    feed = [{"CPU": 1.0} for _ in range(config.feed_cpus)]
    return [dict(worker) for _ in range(config.num_workers)] + feed


def _current_group() -> PlacementGroup:
    group = get_current_placement_group()
    if group is None:
        raise RuntimeError("this process is in no placement group")
    return group


def feed_strategy() -> PlacementGroupSchedulingStrategy:
    """Return the strategy that places data workers in the current group.

    They start after the training workers, which then hold the other bundles.
    """
    return PlacementGroupSchedulingStrategy(
        placement_group=_current_group(), placement_group_capture_child_tasks=True
    )


class ReservedGroup(DefaultPlacementGroupHandle):
    """The current placement group, which whoever reserved it will remove."""

    def __init__(self) -> None:
        """Take the placement group of this process.

        Raises:
            RuntimeError: This process is in no placement group.
        """
        super().__init__(_current_group())

    def shutdown(self) -> None:
        """Keep the group: workers that are started again use it."""
