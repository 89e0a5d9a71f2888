"""Runs Ray Train's controller in the calling process.

Ray Train starts a process for its controller, which takes seconds, and which ends with the process
that started it anyway. It has no public option to do without, so this module calls the controller
itself. Callbacks then run in the calling process as well.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.actor import ActorHandle
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import Worker, WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    PlacementGroupHandle,
)

from pipelines.train.reserved import ReservedGroup

_SETTINGS = {
    # The controller calls `ray.get` between its asynchronous calls, as it does in its own process.
    RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE,
    # It would replace the handlers of this process's log.
    ENABLE_CONTROLLER_STRUCTURED_LOGGING_ENV_VAR: "0",
}


class _WorkersOfThisProcess(WorkerGroup):
    """Training workers of a controller that is no actor."""

    def _init_train_context_on_workers(
        self,
        workers: list[Worker],
        sync_actor: ActorHandle,
        train_context_args: dict[str, list[Any]],
    ) -> None:
        # Ray Train's own method asks for the handle of the controller's actor. Workers use it for
        # `ray.train.get_all_reported_checkpoints`, which the training does not call.
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: of_workers[rank] for name, of_workers in train_context_args.items()},
                )
                for rank, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)


class _WorkersInReservedGroup(_WorkersOfThisProcess):
    """Training workers in the current placement group."""

    def _create_placement_group(self, *settings: Any) -> PlacementGroupHandle:
        return ReservedGroup()


class _Controller(TrainController):
    worker_group_cls = _WorkersOfThisProcess


class _ControllerInReservedGroup(TrainController):
    worker_group_cls = _WorkersInReservedGroup


def without_needless_callbacks(callbacks: Sequence[Any], has_datasets: bool) -> list[Any]:
    """Return Ray Train's callbacks without those that start an actor for nothing.

    The workers would wait for these actors. One manages datasets, even if there are none. Another
    removes the placement group of a controller that died; Ray removes that of a process that died.
    """
    needless: tuple[type, ...] = (PlacementGroupCleanerCallback,)
    if not has_datasets:
        needless = (*needless, DatasetsCallback)
    return [one for one in callbacks if not isinstance(one, needless)]


def run_controller(settings: Mapping[str, Any], reserved: bool) -> Any:
    """Run Ray Train's controller until the training has ended, and end its workers.

    Args:
        settings: Arguments of Ray Train's controller.
        reserved: Whether the workers run in the placement group of this process.

    Returns:
        Ray Train's result.
    """
    os.environ.update({name: value for name, value in _SETTINGS.items() if name not in os.environ})
    controller = (_ControllerInReservedGroup if reserved else _Controller)(**settings)
    # `asyncio.run` would take SIGINT, and hand it on only when the controller waits the next time.
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(controller.run())
    finally:
        loop.close()
        group = controller.get_worker_group()
        if group is not None and group.has_started():  # this process was told to stop
            group.abort()
    return controller.get_result()
