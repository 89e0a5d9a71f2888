"""Errors reach the user as they were raised, also from another process."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import ray.data
from ray.data import ActorPoolStrategy

from pipelines.common import ray_errors
from stgt.errors import (
    CheckpointMismatchError,
    ClipStoreError,
    NonFiniteLossError,
    STGTError,
    VideoDecodeError,
)

ERRORS = [
    ClipStoreError("a store"),
    VideoDecodeError("clip", "empty", "no bytes"),
    CheckpointMismatchError("file", ["a"], ["b"]),
    NonFiniteLossError(3, {"loss/total": float("inf")}, ["clip"]),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_between_processes(error: STGTError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.__dict__ == error.__dict__


class Stage:
    @ray_errors.errors_as_rows
    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if (block["id"] == 2).any():
            raise NonFiniteLossError(2, {}, ["clip"])
        if (block["id"] == 9).any():
            raise KeyError("a bug")
        return block


def run(numbers: int) -> list[int]:
    data = ray.data.range(numbers, override_num_blocks=numbers)
    stage = data.map_batches(Stage, batch_size=None, compute=ActorPoolStrategy(size=1))
    return [row["id"] for row in ray_errors.rows(stage)]


@pytest.mark.ray
def test_a_stage_hands_an_explained_error_to_the_driver(ray_cluster: None) -> None:
    assert run(2) == [0, 1]
    with pytest.raises(NonFiniteLossError, match="not finite at step 2"):
        run(4)


def test_a_bug_in_a_stage_is_not_contained() -> None:
    with pytest.raises(KeyError, match="a bug"):
        Stage()({"id": np.array([9])})


def test_the_root_cause_is_the_innermost_explained_error() -> None:
    outer = RuntimeError("wrapped")
    outer.__cause__ = ClipStoreError("the store")
    assert str(ray_errors.root_cause(outer)) == "the store"
    bug = RuntimeError("a bug")
    assert ray_errors.root_cause(bug) is bug


def test_an_error_that_was_being_handled_is_not_taken_for_the_cause() -> None:
    bug = AssertionError("a bug")
    bug.__context__ = ValueError("handled a moment before")
    assert ray_errors.root_cause(bug) is bug


def test_what_the_cluster_lost_is_told_from_mistakes_of_ours() -> None:
    from ray.exceptions import ActorDiedError, WorkerCrashedError

    from pipelines.common.ray_errors import is_of_the_cluster

    wrapped = RuntimeError("a stage failed")
    wrapped.__cause__ = ActorDiedError()
    assert is_of_the_cluster(wrapped)
    assert is_of_the_cluster(WorkerCrashedError())
    assert not is_of_the_cluster(STGTError("ten clips in a row could not be fetched"))
    assert not is_of_the_cluster(ValueError("a mistake"))
