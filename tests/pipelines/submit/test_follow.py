"""The log of a job, over connections that break, freeze or carry what cannot be read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import requests

from pipelines.submit import follow
from pipelines.submit.cluster_client import ClusterError, JobState
from pipelines.submit.follow import Follower

LOG = '10:00 first\n10:01 sec\u00f6nd\n{"step": 1}\n{"step": 2}\nlast without an end'
RUNNING, DONE = JobState("RUNNING", None, ""), JobState("SUCCEEDED", 0, "")


class Client:
    """Sends a log in chunks; each connection ends as its part of `connections` says."""

    def __init__(self, *connections: tuple[int, str]) -> None:
        self.connections = iter(connections)

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        length, end = next(self.connections)
        text = LOG[:length]
        for start in range(0, len(text), 7):
            yield text[start : start + 7]
        if end == "breaks":
            raise RuntimeError("connection closed unexpectedly with close code 1006")
        if end == "freezes":
            await asyncio.sleep(3600)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the cluster says each time it is asked; the last answer is given again."""
    answers: list[Any] = []

    def state(client: object, name: str) -> JobState:
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(follow, "job_state", state)
    monkeypatch.setattr(follow, "job_log", lambda client, name: LOG)
    monkeypatch.setattr(follow, "PAUSE_S", 0.01)
    monkeypatch.setattr(follow, "QUIET_S", 0.2)
    monkeypatch.setattr(follow, "AWAY_S", 0.3)
    return answers


def followed(client: Any, states: list[Any], *answers: Any) -> JobState:
    states.extend(answers)
    return Follower(client, "job").until_end()


AWAY = requests.ConnectionError("refused")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("connections", "answers"),
    [
        ([(len(LOG), "ends")], [DONE]),
        ([(20, "breaks"), (5, "breaks"), (len(LOG), "ends")], [RUNNING, RUNNING, DONE]),
        ([(25, "freezes"), (len(LOG), "freezes")], [RUNNING, DONE]),
        # A log that can no longer be read is asked for whole at the end.
        ([(13, "breaks"), (0, "breaks")], [RUNNING, DONE]),
        ([(30, "breaks"), (0, "breaks"), (len(LOG), "ends")], [AWAY, AWAY, DONE]),
    ],
)
def test_every_line_is_printed_once(
    connections: list[tuple[int, str]],
    answers: list[Any],
    states: list[Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follow, "AWAY_S", 60)
    assert followed(Client(*connections), states, *answers) == DONE
    shown = capsys.readouterr()
    assert shown.out == '{"step": 1}\n{"step": 2}\n'
    assert shown.err == "10:00 first\n10:01 sec\u00f6nd\nlast without an end\n"


def endless() -> Iterator[tuple[int, str]]:
    while True:
        yield 0, "breaks"


def test_a_cluster_that_stays_away_is_given_up(states: list[Any]) -> None:
    client: Any = Client()
    client.connections = endless()
    with pytest.raises(ClusterError, match="the cluster has not answered for 0 s"):
        followed(client, states, RUNNING, AWAY)


def test_a_job_that_is_not_stopped_is_given_up(states: list[Any]) -> None:
    client: Any = Client()
    client.connections = endless()
    states.append(JobState("PENDING", None, "waits for resources"))
    with pytest.raises(ClusterError, match="the cluster has not stopped job within"):
        Follower(client, "job").until_end(limit_s=0.1)
