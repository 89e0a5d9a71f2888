"""A training in a placement group that is reserved for it: what is reserved, and who runs where."""

from __future__ import annotations

import time

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipelines.train.config import TrainConfig
from pipelines.train.reserved import bundles, feed_strategy
from stgt.config import stgt_tiny
from tests.helpers.waiting import wait_until


def training(**changes: object) -> TrainConfig:
    values = {"data": ("s",), "output": "o", "model": stgt_tiny(), "global_batch": 16}
    return TrainConfig(**{**values, "num_workers": 2, "threads_per_worker": 3, **changes})


def test_every_worker_has_a_bundle_of_its_own() -> None:
    """One bundle for all data workers would have to be on one node."""
    config = training(num_loaders=4)
    found = bundles(config)
    assert found[:2] == [{"CPU": 3.0}, {"CPU": 3.0}]
    assert found[2:] == [{"CPU": 1.0}] * config.feed_cpus
    assert config.feed_cpus >= 4
    assert sum(bundle["CPU"] for bundle in found) == config.num_cpus()
    assert bundles(training(num_loaders=0, use_gpu=True)) == [{"CPU": 3.0, "GPU": 1.0}] * 2


@pytest.mark.ray
def test_a_process_outside_of_a_placement_group_has_nowhere_to_put_data_workers(
    ray_cluster: None,
) -> None:
    with pytest.raises(RuntimeError, match="in no placement group"):
        feed_strategy()


@pytest.mark.ray
def test_data_workers_take_all_bundles_that_training_workers_leave(ray_cluster: None) -> None:
    """Three at a time, though the cluster has room for more outside of the group."""

    @ray.remote(num_cpus=1)
    class Worker:
        def group(self) -> str:
            return ray.get_runtime_context().get_placement_group_id() or ""

    @ray.remote(num_cpus=0)
    class Trial:
        """As the process of a trial, which holds no CPU."""

        def start(self, count: int) -> None:
            options = Worker.options(scheduling_strategy=feed_strategy())  # type: ignore[attr-defined]
            self.workers = [options.remote() for _ in range(count)]

        def groups(self) -> list[str]:
            """Groups of the workers that have started."""
            asked = [worker.group.remote() for worker in self.workers]
            started, _ = ray.wait(asked, num_returns=len(asked), timeout=0.2)
            return ray.get(started)

    group = placement_group([{"CPU": 1.0}] * 3)
    try:
        ours = PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_capture_child_tasks=True
        )
        trial = Trial.options(scheduling_strategy=ours).remote()  # type: ignore[attr-defined]
        ray.get(trial.start.remote(4))
        wait_until(lambda: len(ray.get(trial.groups.remote())) == 3)
        time.sleep(1)
        assert ray.get(trial.groups.remote()) == [group.id.hex()] * 3
    finally:
        remove_placement_group(group)
