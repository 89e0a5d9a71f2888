"""A stage that waits for free CPUs says so."""

from __future__ import annotations

import logging
import time

import pytest
import ray

from pipelines.common import waiting
from tests.helpers.waiting import wait_until


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Free resources of a cluster of two CPUs, as Ray would report them; times are short."""
    free: dict[str, float] = {}
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: dict(free))
    monkeypatch.setattr(waiting, "FIRST_S", 0.05)
    monkeypatch.setattr(waiting, "EVERY_S", 0.1)
    return free


def test_what_is_waited_for_is_said_again_and_again(
    cluster: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    with waiting.telling_of_wait("ingest", {"CPU": 1}, lambda: False):
        wait_until(lambda: len(caplog.messages) >= 2)
    assert caplog.messages[0] == (
        "ingest: no worker has started after 0 s; it needs 1 CPU, and in the cluster 0 of 2 CPUs "
        "are free; it starts as soon as other work frees them"
    )


def test_workers_that_hold_the_cpus_and_are_starting_are_not_said_to_lack_them(
    cluster: dict[str, float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 0.3)
    cluster["CPU"] = 2.0
    with waiting.telling_of_wait("ingest", {"CPU": 1}, lambda: False):
        cluster["CPU"] = 0.0
        wait_until(lambda: bool(caplog.messages))
    assert caplog.messages[0].endswith("0 of 2 CPUs are free; workers are starting")


def test_work_that_begins_in_time_says_nothing(
    cluster: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), waiting.telling_of_wait("x", {"CPU": 1}, lambda: True):
        time.sleep(0.2)
    assert not caplog.messages
