"""Runs the workers of a training in a placement group that is reserved already.

A trial of a sweep starts once Ray Tune has reserved all of its resources: a bundle for each
training worker, then one for each data worker. Ray Train would request a placement group of its own
beside it, and the trials of a sweep would wait for each other's resources. It has no public option
to use an existing group, so this module replaces where its worker group gets one from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
    PlacementGroupHandle,
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


class _Reserved(DefaultPlacementGroupHandle):
    """The current placement group, which whoever reserved it will remove."""

    def shutdown(self) -> None:
        """Keep the group: workers that are started again use it."""


class _WorkersInReservedGroup(WorkerGroup):
    """Training workers in the current placement group."""

    def _create_placement_group(self, *settings: Any) -> PlacementGroupHandle:
        return _Reserved(_current_group())


class _ControllerInReservedGroup(TrainController):
    worker_group_cls = _WorkersInReservedGroup


def without_needless_callbacks(
    callbacks: Sequence[Any], has_datasets: bool, reserved: bool
) -> list[Any]:
    """Return Ray Train's callbacks without those that start an actor for nothing.

    The workers would wait for these actors. One manages datasets, even if there are none. Another
    removes the placement group of a controller that died, which a reserved group must survive.
    """
    needless: tuple[type, ...] = () if has_datasets else (DatasetsCallback,)
    if reserved:
        needless = (*needless, PlacementGroupCleanerCallback)
    return [one for one in callbacks if not isinstance(one, needless)]


def run_controller(settings: Mapping[str, Any]) -> Any:
    """Run Ray Train's controller with workers in the current placement group.

    Args:
        settings: Arguments of Ray Train's controller.

    Returns:
        Ray Train's result.
    """
    controller = (
        ray.remote(_ControllerInReservedGroup)
        .options(num_cpus=0, runtime_env={"env_vars": get_env_vars_to_propagate()})
        .remote(**settings)
    )
    ray.get(controller.run.remote())
    return ray.get(controller.get_result.remote())
