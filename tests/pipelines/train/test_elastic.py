"""Numbers of workers that share a global batch, steps of epochs, and the best checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision

from pipelines.artifacts import checkpoints
from pipelines.common.tracking import StepMetrics
from pipelines.train import metrics_log, run_folder
from pipelines.train.config import TrainConfig
from pipelines.train.elastic import EvenSharesPolicy
from pipelines.train.run_folder import record_best
from stgt.config import stgt_tiny


def elastic(**changes: object) -> TrainConfig:
    values = {"data": ("s",), "output": "o", "model": stgt_tiny(), "global_batch": 160}
    return TrainConfig(**{**values, "num_workers": 8, "min_workers": 3, **changes})


def test_worlds_are_the_divisors_of_the_global_batch() -> None:
    assert elastic().allowed_worker_counts == (4, 5, 8)
    assert elastic().clips_per_block == 4
    assert elastic(num_workers=4, min_workers=None).allowed_worker_counts == (4,)
    with pytest.raises(ValueError, match=r"num_workers \(6\).*such as 162"):
        elastic(num_workers=6)


class OnACluster(EvenSharesPolicy):
    """The policy on a cluster of two nodes, one of which has two CPUs."""

    cpus = 0
    """Of the other node."""

    def _maybe_send_resource_request(self) -> None:
        pass

    def _get_reserved_resources(self) -> dict[str, dict[str, float]]:
        return {"a": {"CPU": self.cpus}, "b": {"CPU": 2}}


def test_what_is_left_of_a_cluster_is_used_as_far_as_shares_are_even() -> None:
    """By the decisions that Ray Train asks for."""
    policy = OnACluster(
        ScalingConfig(num_workers=(3, 8), resources_per_worker={"CPU": 1}),
        elastic().allowed_worker_counts,
    )
    found = []
    for policy.cpus in range(8):
        decision = policy.make_decision_for_non_running_worker_group()
        found.append(decision.num_workers if isinstance(decision, ResizeDecision) else 0)
    assert found == [0, 0, 4, 5, 5, 5, 8, 8]


def test_epochs_are_counted_without_binary_rounding() -> None:
    assert elastic(epochs=1.1, global_batch=16).steps_for(160) == 11
    assert elastic(epochs=1.1, global_batch=16).steps_for(161) == 12
    assert elastic(steps=7).steps_for(161) == 7


def test_a_best_checkpoint_that_a_kill_left_unnoted_is_found(tmp_path: Path) -> None:
    """Of complete checkpoints only; steps whose marker is missing do not count."""
    config = elastic(output=str(tmp_path), hold_out=4)
    for step, recall, complete in ((2, 30.0, True), (4, 50.0, True), (6, 90.0, False)):
        folder = Path(run_folder.checkpoint_uri(str(tmp_path), step))
        folder.mkdir(parents=True)
        if complete:
            (folder / checkpoints.COMPLETE).touch()
        row = StepMetrics(step=step, time_ms=0, metrics={"val/t2v/R1": recall})
        metrics_log.write(str(tmp_path), [row])
    record_best(config)
    found = run_folder.best(str(tmp_path))
    assert found is not None
    assert (found["step"], found["value"]) == (4, 50.0)
